#include "reactor.hpp"

#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <exception>
#include <utility>

#include <weightsync/copy.hpp>
#include <weightsync/error.hpp>

namespace weightsync::net {

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

Reactor::Reactor(std::string name, std::function<void()> on_start)
    : name_(std::move(name)),
      on_start_(std::move(on_start)),
      epoll_(::epoll_create1(EPOLL_CLOEXEC)),
      owner_pid_(::getpid()) {
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
    watched_.emplace(id, Watched{fd, std::make_shared<Handler>(std::move(handler))});
    try {
        add_to_epoll(epoll_.get(), fd, events, id);
        if (!thread_.joinable()) {
            thread_ = start_thread(
                name_.c_str(), [](void* self) { static_cast<Reactor*>(self)->loop(); }, this);
        }
    } catch (...) {
        watched_.erase(id);
        ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
        throw;
    }
    return id;
}

void Reactor::unwatch(std::uint64_t id) noexcept {
    if (id == 0 || ::getpid() != owner_pid_) {
        return;  // a forked child shares the epoll instance: its parent still needs the entry
    }
    std::shared_ptr<Handler> handler;  // destroyed outside the lock
    std::unique_lock lock(mutex_);
    const auto found = watched_.find(id);
    if (found != watched_.end()) {
        ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, found->second.fd, nullptr);
        handler = std::move(found->second.handler);
        watched_.erase(found);
    }
    if (std::this_thread::get_id() != thread_id_) {
        ++num_waiting_;
        handler_left_.wait(lock, [&] { return running_ != id; });
        --num_waiting_;
    }
    lock.unlock();
}

void Reactor::quiesce() noexcept {
    if (::getpid() != owner_pid_) {
        return;
    }
    std::unique_lock lock(mutex_);
    if (std::this_thread::get_id() == thread_id_) {
        return;
    }
    const std::uint64_t seen = num_runs_;
    ++num_waiting_;
    handler_left_.wait(lock, [&] { return running_ == 0 || num_runs_ != seen; });
    --num_waiting_;
}

void Reactor::stop() noexcept {
    if (::getpid() != owner_pid_) {
        return;
    }
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

bool Reactor::run(std::uint64_t id, std::uint32_t events) {
    std::shared_ptr<Handler> handler;
    {
        const std::lock_guard lock(mutex_);
        const auto found = watched_.find(id);
        if (found == watched_.end()) {
            return false;
        }
        handler = found->second.handler;
        running_ = id;
        ++num_runs_;
    }
    bool is_wanted_again = false;
    try {
        is_wanted_again = (*handler)(events);
    } catch (const std::exception& error) {
        // An event cannot be refused: what it was about shows up as a deadline elsewhere.
        report(name_ + ": " + error.what());
    }
    handler.reset();  // whoever waits in unwatch() may count on what it held being gone
    const std::lock_guard lock(mutex_);
    running_ = 0;
    if (num_waiting_ != 0) {
        handler_left_.notify_all();
    }
    return is_wanted_again;
}

void Reactor::loop() {
    {
        const std::lock_guard lock(mutex_);
        thread_id_ = std::this_thread::get_id();
    }
    if (on_start_) {
        on_start_();
    }
    std::vector<std::uint64_t> again;
    std::vector<std::uint64_t> turn;
    for (;;) {
        std::array<epoll_event, 64> events;
        const int count = ::epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()),
                                       again.empty() ? -1 : 0);
        turn.swap(again);
        again.clear();
        for (int i = 0; i < count; ++i) {
            const epoll_event& event = events[static_cast<std::size_t>(i)];
            if (event.data.u64 == 0) {
                return;
            }
            if (run(event.data.u64, event.events)) {
                again.push_back(event.data.u64);
            }
            std::erase(turn, event.data.u64);  // it had its turn
        }
        for (const std::uint64_t id : turn) {
            if (run(id, 0)) {
                again.push_back(id);
            }
        }
    }
}

Timer::Timer() : fd_(::timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)) {
    if (!fd_) {
        throw os_error(Scope::kMemory, "timerfd_create", errno, "check `ulimit -n`");
    }
}

void Timer::set(std::chrono::nanoseconds after) const noexcept {
    constexpr std::int64_t kPerSecond = 1'000'000'000;
    const std::int64_t nanoseconds = std::max<std::int64_t>(after.count(), 1);
    itimerspec spec{};
    spec.it_value.tv_sec = nanoseconds / kPerSecond;
    spec.it_value.tv_nsec = nanoseconds % kPerSecond;
    ::timerfd_settime(fd_.get(), 0, &spec, nullptr);
}

void Timer::clear() const noexcept {
    const itimerspec none{};
    ::timerfd_settime(fd_.get(), 0, &none, nullptr);
}

void Timer::drain() const noexcept {
    std::uint64_t expirations = 0;
    [[maybe_unused]] const ssize_t got = ::read(fd_.get(), &expirations, sizeof(expirations));
}

}  // namespace weightsync::net
