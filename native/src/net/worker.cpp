#include "worker.hpp"

#include <unistd.h>

#include <exception>
#include <string>
#include <utility>

#include <weightsync/copy.hpp>
#include <weightsync/error.hpp>

namespace weightsync::net {

Worker::Worker() : owner_pid_(::getpid()) {}

void Worker::submit(const void* owner, std::function<void()> task) {
    const std::lock_guard lock(mutex_);
    if (is_stopping_) {
        return;
    }
    tasks_.push_back({owner, std::move(task)});
    if (!thread_.joinable()) {
        thread_ =
            start_thread("ws-dial", [](void* self) { static_cast<Worker*>(self)->loop(); }, this);
    }
    changed_.notify_all();
}

void Worker::cancel(const void* owner) noexcept {
    if (::getpid() != owner_pid_) {
        return;
    }
    std::unique_lock lock(mutex_);
    std::erase_if(tasks_, [owner](const Task& task) { return task.owner == owner; });
    changed_.wait(lock, [&] { return running_ != owner; });
}

void Worker::stop() noexcept {
    if (::getpid() != owner_pid_) {
        return;
    }
    std::thread thread;
    {
        const std::lock_guard lock(mutex_);
        is_stopping_ = true;
        tasks_.clear();
        thread.swap(thread_);
        changed_.notify_all();
    }
    if (thread.joinable()) {
        thread.join();
    }
}

void Worker::loop() {
    std::unique_lock lock(mutex_);
    for (;;) {
        changed_.wait(lock, [this] { return is_stopping_ || !tasks_.empty(); });
        if (is_stopping_) {
            return;
        }
        {
            Task task = std::move(tasks_.front());
            tasks_.pop_front();
            running_ = task.owner;
            lock.unlock();
            try {
                task.body();
            } catch (const std::exception& error) {
                report(std::string("ws-dial: ") + error.what());
            }
        }
        lock.lock();
        running_ = nullptr;
        changed_.notify_all();
    }
}

}  // namespace weightsync::net
