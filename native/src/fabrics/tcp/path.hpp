// One rail here to one rail of the peer: a few connections that share one end of the queue.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include <weightsync/rails.hpp>
#include <weightsync/send_queue.hpp>

#include "rail.hpp"
#include "source_stream.hpp"
#include "wire.hpp"

namespace weightsync::tcp {

[[nodiscard]] inline PathHealth::Time now() noexcept {
    return std::chrono::steady_clock::now();
}

// What a path tells its remote; called with the path's lock held, so it only takes notes.
class PathOwner {
  public:
    virtual void on_path_failed(std::size_t path) noexcept = 0;
    // Nothing has moved for a while. Either the path is dead or the peer is frozen: ask it another
    // way, and tell condemn() when it answers. Called again as long as nothing moves.
    virtual void on_path_stalled(std::size_t path) noexcept = 0;

  protected:
    ~PathOwner() = default;
};

class Path {
  public:
    Path(std::size_t number, Rail& rail, PathOwner& owner, SendQueue& queue,
         std::uint64_t window_bytes, std::uint64_t block_bytes);
    ~Path() { shut(); }
    Path(const Path&) = delete;
    Path& operator=(const Path&) = delete;

    // Begins to send over these connections. False, and they are closed, after shut().
    bool attach(std::vector<UniqueFd> sockets, bool is_probe);
    // There is work, or there may be. Any thread.
    void wake() const noexcept { event_.signal(); }
    // Ends all connections, for good. After it returns no source memory is read and no handler
    // runs. Not on the rail's thread.
    void shut() noexcept;

    [[nodiscard]] Rail& rail() const noexcept { return rail_; }
    [[nodiscard]] PathState state() const;
    [[nodiscard]] PathHealth::Time probe_time() const;
    [[nodiscard]] std::uint32_t attempt() const;
    std::uint32_t begin_probe();
    void probe_failed();
    // As a path that could not be built when the remote was: nothing of it can land.
    void quarantine();
    // The sink says that nothing of this attempt can land; true when that was awaited.
    bool fenced(std::uint32_t attempt);
    // The peer is alive: if nothing has moved up to now this path is dead.
    void condemn(std::uint32_t attempt) noexcept;

  private:
    using Stream = std::shared_ptr<SourceStream>;
    bool on_event(const Stream& stream, std::uint32_t events);
    bool on_wake();
    void on_tick();
    // What follows: with mutex_ held.
    [[nodiscard]] bool pump();
    [[nodiscard]] bool take_acks(SourceStream& stream);
    void fail() noexcept;
    [[nodiscard]] std::uint64_t num_moved() const noexcept;

    const std::size_t number_;
    Rail& rail_;
    PathOwner& owner_;
    SendQueue& queue_;
    const std::uint64_t window_bytes_;
    const std::uint64_t block_bytes_;
    const EventFd event_;
    const net::Timer timer_;
    std::uint64_t event_watch_ = 0;
    std::uint64_t timer_watch_ = 0;

    mutable std::mutex mutex_;
    PathHealth health_;
    bool is_shut_ = false;
    std::vector<Stream> streams_;
    bool is_ticking_ = false;
    std::uint64_t moved_at_tick_ = 0;
    PathHealth::Time moved_time_{};
    bool is_condemned_ = false;
};

}  // namespace weightsync::tcp
