#include "rail.hpp"

#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

#include <weightsync/copy.hpp>
#include <weightsync/error.hpp>
#include <weightsync/wait.hpp>

namespace weightsync::ofi {

namespace {

using Clock = std::chrono::steady_clock;
using namespace std::chrono_literals;

// Without a descriptor a rail sleeps longer and longer: the last is the worst wake-up latency, and
// costs about 0.2 % of a core.
constexpr std::chrono::nanoseconds kFirstNap = 20us;
constexpr std::chrono::nanoseconds kLongestNap = 4ms;
// With descriptors: providers have timers of their own that only polling moves.
constexpr std::chrono::nanoseconds kLongestWait = 100ms;
// A provider returns from a poll in no time, unless a peer was killed while it held a lock in
// memory that both share (`shm`): then never.
constexpr double kStop_s = 5;

}  // namespace

Rail::Rail(std::shared_ptr<Domain> domain, std::string name)
    : domain_(std::move(domain)), name_(std::move(name)), owner_pid_(::getpid()) {}

void Rail::add(std::shared_ptr<Pollable> pollable) {
    {
        const std::lock_guard lock(mutex_);
        if (is_stopping_) {
            throw Error(Scope::kConfig, "the engine is closed");
        }
        pollables_.push_back(std::move(pollable));
        list_version_.fetch_add(1);
        if (!thread_.joinable()) {
            // The thread keeps the rail alive: it may have to be left behind.
            auto self = std::make_unique<std::shared_ptr<Rail>>(shared_from_this());
            thread_ = start_thread(
                name_.c_str(),
                [](void* argument) {
                    const std::unique_ptr<std::shared_ptr<Rail>> rail(
                        static_cast<std::shared_ptr<Rail>*>(argument));
                    (*rail)->loop();
                    (*rail)->is_over_.store(true);
                },
                self.get());
            self.release();
        }
    }
    wake();
}

void Rail::remove(const Pollable& pollable) noexcept {
    const std::lock_guard lock(mutex_);
    std::erase_if(pollables_, [&](const auto& known) { return known.get() == &pollable; });
    list_version_.fetch_add(1);
}

void Rail::wake() noexcept {
    // What there is to do was told by a sequentially consistent store before this: either sleep()
    // sees it, or we see the rail asleep.
    if (is_sleeping_.load(std::memory_order_seq_cst)) {
        wake_event_.signal();
    }
}

void Rail::stop() noexcept {
    std::thread thread;
    {
        const std::lock_guard lock(mutex_);
        is_stopping_ = true;
        thread.swap(thread_);
    }
    if (!thread.joinable()) {
        return;
    }
    if (::getpid() != owner_pid_) {
        thread.detach();  // it lives in the parent only
        return;
    }
    wake_event_.signal();
    const Deadline deadline = Deadline::after(kStop_s);
    while (!is_over_.load() && !deadline.passed()) {
        std::this_thread::sleep_for(100us);
    }
    if (is_over_.load()) {
        thread.join();
        return;
    }
    report("the provider of " + domain_->label() +
           " does not return from a poll: a peer was killed while it held a lock of theirs. One "
           "thread and what it uses are left behind until this process ends, to run where nobody "
           "else wants to");
    abandon(std::move(thread));
}

void Rail::loop() {
    List pollables;
    std::uint64_t known_version = 0;
    auto last_move = Clock::now();
    while (!is_stopping_) {
        if (const std::uint64_t now_version = list_version_.load(); now_version != known_version) {
            List fresh;
            {
                const std::lock_guard lock(mutex_);
                fresh = pollables_;
            }
            known_version = now_version;
            pollables.swap(fresh);  // what was removed may end here, without the lock
        }
        bool has_moved = false;
        for (const auto& pollable : pollables) {
            has_moved |= pollable->progress();
        }
        const auto now = Clock::now();
        if (has_moved) {
            last_move = now;
        } else if (now - last_move > kSpin) {
            sleep(pollables, now - last_move);
        } else {
            cpu_relax();
        }
    }
}

void Rail::sleep(const List& pollables, std::chrono::nanoseconds idle) {
    std::vector<pollfd> waited{{wake_event_.get(), POLLIN, 0}};
    is_sleeping_.store(true, std::memory_order_seq_cst);
    const std::uint64_t known_version = list_version_.load();
    auto limit = kLongestWait;
    bool is_expecting = false;
    bool may_sleep = !is_stopping_;
    for (const auto& pollable : pollables) {
        const Pollable::Rest rest = pollable->rest();
        may_sleep = may_sleep && rest.may_sleep;
        if (!rest.is_expecting) {
            continue;
        }
        is_expecting = true;
        if (rest.wait_fd >= 0) {
            waited.push_back({rest.wait_fd, POLLIN, 0});
        } else {
            // A nap as long as a quarter of the idle time so far.
            limit = std::min(limit, std::clamp(idle / 4, kFirstNap, kLongestNap));
        }
    }
    if (may_sleep && known_version == list_version_.load()) {
        timespec timeout{0, static_cast<long>(limit.count())};
        ::ppoll(waited.data(), waited.size(), is_expecting ? &timeout : nullptr, nullptr);
    }
    is_sleeping_.store(false, std::memory_order_seq_cst);
    if ((waited.front().revents & POLLIN) != 0) {
        wake_event_.drain();
    }
}

}  // namespace weightsync::ofi
