// One rail: a domain, and the thread that moves everything on it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include <weightsync/os.hpp>

#include "objects.hpp"

namespace weightsync::ofi {

// Something with an endpoint on a rail.
class Pollable {
  public:
    virtual ~Pollable() = default;
    // Polls and posts; on the rail's thread. True when something moved.
    virtual bool progress() noexcept = 0;
    // Looked at right after progress() said that nothing moved.
    struct Rest {
        int wait_fd = -1;          // -1: only polling helps
        bool may_sleep = true;     // false: there is work already
        bool is_expecting = true;  // false: nothing can come before wake() is called
    };
    [[nodiscard]] virtual Rest rest() noexcept = 0;
};

class Rail : public std::enable_shared_from_this<Rail> {
  public:
    // `name`: of the thread, at most 15 characters. Someone calls stop() in the end.
    Rail(std::shared_ptr<Domain> domain, std::string name);
    ~Rail() = default;
    Rail(const Rail&) = delete;
    Rail& operator=(const Rail&) = delete;

    [[nodiscard]] const std::shared_ptr<Domain>& domain() const noexcept { return domain_; }
    // Starts the thread with the first.
    void add(std::shared_ptr<Pollable> pollable);
    // It may be polled once more right after: it looks whether it is closed.
    void remove(const Pollable& pollable) noexcept;
    // There is work. Any thread; a system call only when the rail sleeps.
    void wake() noexcept;
    // Nothing is connected.
    [[nodiscard]] bool is_idle() const {
        const std::lock_guard lock(mutex_);
        return pollables_.empty();
    }
    // Ends the thread; within seconds, even if the provider does not let go of it.
    void stop() noexcept;

    // Of all paths, for Engine::rails().
    std::atomic<std::uint64_t> bytes_out{0};
    std::atomic<std::uint64_t> bytes_done{0};  // of those, delivered or taken back
    std::atomic<std::uint64_t> bytes_in{0};

  private:
    using List = std::vector<std::shared_ptr<Pollable>>;
    void loop();
    void sleep(const List& pollables, std::chrono::nanoseconds idle);

    std::shared_ptr<Domain> domain_;
    std::string name_;
    int owner_pid_;
    EventFd wake_event_;
    std::atomic<bool> is_sleeping_{false};
    std::atomic<bool> is_stopping_{false};
    mutable std::mutex mutex_;  // pollables_, thread_
    List pollables_;
    std::atomic<std::uint64_t> list_version_{0};
    std::thread thread_;
    std::atomic<bool> is_over_{false};
};

}  // namespace weightsync::ofi
