// A thread for what has to block, such as dialling a path again; started with the first task.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

namespace weightsync::net {

class Worker {
  public:
    Worker();
    ~Worker() { stop(); }
    Worker(const Worker&) = delete;
    Worker& operator=(const Worker&) = delete;

    // Runs the task after all earlier ones; dropped after stop().
    void submit(const void* owner, std::function<void()> task);
    // Drops the owner's tasks and waits for one that runs, which should notice. Not from a task.
    void cancel(const void* owner) noexcept;
    void stop() noexcept;

  private:
    struct Task {
        const void* owner;
        std::function<void()> body;
    };
    void loop();

    int owner_pid_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<Task> tasks_;
    const void* running_ = nullptr;
    bool is_stopping_ = false;
    std::thread thread_;
};

}  // namespace weightsync::net
