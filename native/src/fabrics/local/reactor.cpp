#include "reactor.hpp"

#include <sys/epoll.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <exception>

#include <weightsync/copy.hpp>
#include <weightsync/error.hpp>

namespace weightsync::local {

namespace {

void add_to_epoll(int epoll, int fd, std::uint32_t events, std::uint64_t id) {
    epoll_event event{};
    event.events = events;
    event.data.u64 = id;
    if (::epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) != 0) {
        throw os_error(Scope::kMemory, "epoll_ctl", errno, "check fs.epoll.max_user_watches");
    }
}

}  // namespace

Reactor::Reactor() : epoll_(::epoll_create1(EPOLL_CLOEXEC)), owner_pid_(::getpid()) {
    if (!epoll_) {
        throw os_error(Scope::kMemory, "epoll_create1", errno, "check `ulimit -n`");
    }
    add_to_epoll(epoll_.get(), stop_event_.get(), EPOLLIN, 0);
}

std::uint64_t Reactor::watch(int fd, std::uint32_t events, Handler handler) {
    const std::lock_guard lock(mutex_);
    if (is_stopping_) {
        throw Error(Scope::kConfig, "the engine is closed");
    }
    const std::uint64_t id = next_id_++;
    add_to_epoll(epoll_.get(), fd, events, id);
    watched_.emplace(id, Watched{fd, std::make_shared<Handler>(std::move(handler))});
    if (!thread_.joinable()) {
        thread_ = start_thread(
            "ws-reactor", [](void* self) { static_cast<Reactor*>(self)->loop(); }, this);
    }
    return id;
}

void Reactor::unwatch(std::uint64_t id) noexcept {
    if (::getpid() != owner_pid_) {
        return;  // a forked child shares the epoll instance: its parent still needs the entry
    }
    std::shared_ptr<Handler> handler;  // destroyed outside the lock
    const std::lock_guard lock(mutex_);
    const auto found = watched_.find(id);
    if (found == watched_.end()) {
        return;
    }
    ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, found->second.fd, nullptr);
    handler = std::move(found->second.handler);
    watched_.erase(found);
}

void Reactor::stop() noexcept {
    std::thread thread;
    {
        const std::lock_guard lock(mutex_);
        is_stopping_ = true;
        thread.swap(thread_);
    }
    stop_event_.signal();
    if (thread.joinable()) {
        thread.join();
    }
}

void Reactor::loop() {
    for (;;) {
        std::array<epoll_event, 64> events;
        const int count =
            ::epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), -1);
        for (int i = 0; i < count; ++i) {
            const std::uint64_t id = events[static_cast<std::size_t>(i)].data.u64;
            if (id == 0) {
                return;
            }
            std::shared_ptr<Handler> handler;
            {
                const std::lock_guard lock(mutex_);
                const auto found = watched_.find(id);
                if (found == watched_.end()) {
                    continue;
                }
                handler = found->second.handler;
            }
            try {
                (*handler)();
            } catch (const std::exception& error) {
                // An event cannot be refused: what it was about shows up as a deadline elsewhere.
                report(std::string("local fabric: ") + error.what());
            }
        }
    }
}

}  // namespace weightsync::local
