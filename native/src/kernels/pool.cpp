#include "pool.hpp"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace weightsync::kernels {

namespace {

class Pool {
  public:
    // The pool of this process. Leaked on purpose: helpers sleep until the process ends, and
    // joining them in a static destructor would hang in a forked child, where they do not exist.
    static Pool& instance() {
        static std::mutex guard;
        static Pool* pool = nullptr;
        static pid_t owner = 0;
        const std::lock_guard lock(guard);
        if (pool == nullptr || owner != getpid()) {
            pool = new Pool();
            owner = getpid();
        }
        return *pool;
    }

    // False: the helpers are taken by another call, nothing was done.
    bool try_run(std::int64_t num_tasks, int num_helpers, void (*task)(void*, std::int64_t),
                 void* context) {
        const std::unique_lock exclusive(exclusive_, std::try_to_lock);
        if (!exclusive.owns_lock()) {
            return false;
        }
        {
            const std::lock_guard lock(mutex_);
            start_helpers(num_helpers);
            task_ = task;
            context_ = context;
            num_tasks_ = num_tasks;
            next_.store(0, std::memory_order_relaxed);
            num_wanted_ = num_helpers;
            ++round_;
        }
        wake_.notify_all();
        work();
        // All tasks are taken: helpers that have not woken yet are no longer wanted, those that
        // have may still be inside their last task.
        std::unique_lock lock(mutex_);
        num_wanted_ = 0;
        idle_.wait(lock, [this] { return num_active_ == 0; });
        return true;
    }

  private:
    void start_helpers(int num_helpers) {
        try {
            while (num_threads_ < num_helpers) {
                std::thread([this, id = num_threads_, seen = round_] { serve(id, seen); }).detach();
                ++num_threads_;
            }
        } catch (const std::system_error&) {
            // No more threads allowed: fewer helpers give the same result, later.
        }
    }

    void serve(int id, std::uint64_t seen) {
        std::unique_lock lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return round_ != seen; });
            seen = round_;
            if (id >= num_wanted_) {
                continue;
            }
            ++num_active_;
            lock.unlock();
            work();
            lock.lock();
            if (--num_active_ == 0) {
                idle_.notify_one();
            }
        }
    }

    void work() {
        for (;;) {
            const std::int64_t index = next_.fetch_add(1, std::memory_order_relaxed);
            if (index >= num_tasks_) {
                return;
            }
            task_(context_, index);
        }
    }

    std::mutex exclusive_;  // one call at a time
    std::mutex mutex_;      // guards all below but next_
    std::condition_variable wake_;
    std::condition_variable idle_;
    std::uint64_t round_ = 0;
    int num_threads_ = 0;
    int num_wanted_ = 0;  // helpers that may join the round; 0 once it is over
    int num_active_ = 0;  // helpers inside work()
    void (*task_)(void*, std::int64_t) = nullptr;
    void* context_ = nullptr;
    std::int64_t num_tasks_ = 0;
    std::atomic<std::int64_t> next_{0};
};

}  // namespace

int num_processors() noexcept {
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof(set), &set) == 0) {
        return std::max(1, CPU_COUNT(&set));
    }
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

void run_tasks(std::int64_t num_tasks, int threads, void (*task)(void*, std::int64_t),
               void* context) {
    const auto most = static_cast<int>(std::min<std::int64_t>(num_tasks, threads));
    const int num_helpers = std::min(most, num_processors()) - 1;
    if (num_helpers > 0 && Pool::instance().try_run(num_tasks, num_helpers, task, context)) {
        return;
    }
    for (std::int64_t index = 0; index < num_tasks; ++index) {
        task(context, index);
    }
}

}  // namespace weightsync::kernels
