// One thread that waits for descriptors and calls what belongs to them.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include <weightsync/os.hpp>

namespace weightsync::net {

class Reactor {
  public:
    // Gets the epoll events, 0 when it runs because it asked to. Returns true to be called again
    // once the others had their turn: with EPOLLET nobody else would. Blocks on nothing.
    using Handler = std::function<bool(std::uint32_t events)>;

    // `name`: of the thread, at most 15 characters; `on_start` runs on it first.
    explicit Reactor(std::string name, std::function<void()> on_start = nullptr);
    ~Reactor() { stop(); }
    Reactor(const Reactor&) = delete;
    Reactor& operator=(const Reactor&) = delete;

    // Starts the thread with its first descriptor. Throws kConfig after stop().
    [[nodiscard]] std::uint64_t watch(int fd, std::uint32_t events, Handler handler);
    // After it returns the handler does not run, unless it is the one that calls. Before the
    // descriptor is closed. Never with a lock that the handler takes.
    void unwatch(std::uint64_t id) noexcept;
    // After it returns every handler that ran when it was called has returned: also those that
    // have taken themselves out. From a handler: does nothing.
    void quiesce() noexcept;
    // Joins the thread; not from a handler.
    void stop() noexcept;

  private:
    struct Watched {
        int fd;
        std::shared_ptr<Handler> handler;
    };
    void loop();
    // True when it wants to run again.
    [[nodiscard]] bool run(std::uint64_t id, std::uint32_t events);

    const std::string name_;
    const std::function<void()> on_start_;
    UniqueFd epoll_;
    int owner_pid_;
    EventFd stop_event_;
    std::mutex mutex_;
    std::condition_variable handler_left_;
    std::unordered_map<std::uint64_t, Watched> watched_;
    std::uint64_t next_id_ = 1;  // 0 is the stop event
    std::uint64_t running_ = 0;
    std::uint64_t num_runs_ = 0;
    int num_waiting_ = 0;
    bool is_stopping_ = false;
    std::thread thread_;
    std::thread::id thread_id_;
};

// A descriptor of a Reactor that becomes readable at a time: timeouts cost nothing while unset.
class Timer {
  public:
    Timer();
    [[nodiscard]] int get() const noexcept { return fd_.get(); }
    // Once, `after` from now; at least a nanosecond. Sets it anew when it is set.
    void set(std::chrono::nanoseconds after) const noexcept;
    void clear() const noexcept;
    void drain() const noexcept;

  private:
    UniqueFd fd_;
};

}  // namespace weightsync::net
