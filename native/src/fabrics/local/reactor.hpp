// One thread that waits for descriptors: new connections, doorbells, peers that went away.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>

#include <weightsync/os.hpp>

namespace weightsync::local {

class Reactor {
  public:
    using Handler = std::function<void()>;

    Reactor();
    ~Reactor() { stop(); }
    Reactor(const Reactor&) = delete;
    Reactor& operator=(const Reactor&) = delete;

    // Calls `handler` on the reactor's thread while `fd` has one of `events` (EPOLLIN, ...). The
    // handler may run once more right after unwatch(): it holds weak pointers, and looks.
    [[nodiscard]] std::uint64_t watch(int fd, std::uint32_t events, Handler handler);
    // Before the descriptor is closed.
    void unwatch(std::uint64_t id) noexcept;
    // Joins the thread; not from a handler.
    void stop() noexcept;

  private:
    struct Watched {
        int fd;
        std::shared_ptr<Handler> handler;
    };
    void loop();

    UniqueFd epoll_;
    int owner_pid_;
    EventFd stop_event_;
    std::mutex mutex_;
    std::unordered_map<std::uint64_t, Watched> watched_;
    std::uint64_t next_id_ = 1;  // 0 is the stop event
    bool is_stopping_ = false;
    std::thread thread_;
};

}  // namespace weightsync::local
