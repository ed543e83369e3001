// The source's end of the ofi fabrics.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include <weightsync/fabric.hpp>
#include <weightsync/local_memory.hpp>
#include <weightsync/rails.hpp>
#include <weightsync/send_queue.hpp>

#include "../../net/channel.hpp"
#include "../../net/reactor.hpp"
#include "rail.hpp"
#include "wire.hpp"

namespace weightsync::ofi {

class OfiRemote;

using Clock = PathHealth::Time::clock;

// What the paths of a remote share.
struct Outbox {
    std::unique_ptr<SendQueue> queue;
    std::unique_ptr<std::atomic<bool>[]> has_work;  // by path
    std::shared_ptr<const RangeTable> ranges;
    std::shared_ptr<const LocalMemory> memory;  // null where no provider wants it
};

// What a path must know of the other end.
struct PathSpec {
    std::size_t index = 0;
    std::uint64_t number = 0;  // of all that had this index
    std::shared_ptr<Rail> rail;
    std::size_t rail_index = 0;
    std::shared_ptr<const TargetView::RailView> sink;
    std::string peer;  // for messages
};

// One rail here to one rail of the sink, as long as it works: an endpoint of its own, so that
// closing it takes back all that was posted to this sink and nothing else. A path that is built
// anew is another one of these.
class SourcePath final : public Pollable {
  public:
    SourcePath(PathSpec spec, std::weak_ptr<OfiRemote> remote, std::shared_ptr<Outbox> outbox);

    bool progress() noexcept override;
    [[nodiscard]] Rest rest() noexcept override;
    // The rail's thread closes it soon, and tells the remote.
    void retire() noexcept;
    // The peer is alive: if nothing has moved for long this path is dead.
    void condemn() noexcept;
    // Takes back all that was posted and leaves the rail. At once, or when the provider lets go of
    // our thread.
    void close() noexcept;
    // Nothing of it can land any more: once it is closed its pieces go back to the queue.
    void release() noexcept;
    // A first write has been answered.
    [[nodiscard]] bool is_proven() const noexcept { return is_proven_.load(); }
    [[nodiscard]] std::uint64_t number() const noexcept { return number_; }

  private:
    struct Slot {
        abi::fi_context2 context;  // first: completions name it
        std::uint64_t id = 0;      // of the piece; 0: free, or the probe
        std::uint64_t nbytes = 0;
    };
    static constexpr std::size_t kBatch = 32;
    // Takes a batch of completions; ids of the pieces go to `done`. False when there was none.
    [[nodiscard]] bool reap(std::array<std::uint64_t, kBatch>& done, std::size_t& num_done);
    void drain() noexcept;
    void fail_write(const std::string& text);
    void look_for_stall(bool has_reaped);
    [[nodiscard]] bool post_all();
    [[nodiscard]] bool post_piece(const Piece& piece);
    [[nodiscard]] bool post_probe();
    [[nodiscard]] ssize_t write(Slot& slot, const void* source, std::uint64_t nbytes, void* desc,
                                const RegionFrame& region, std::uint64_t offset,
                                std::uint64_t data) noexcept;
    void close_locked() noexcept;
    void give_back_if_over() noexcept;

    const std::size_t index_;
    const std::uint64_t number_;
    std::shared_ptr<Rail> rail_;
    const std::shared_ptr<const TargetView::RailView> sink_;
    const std::string peer_label_;
    const std::string rail_label_;
    std::weak_ptr<OfiRemote> remote_;
    const std::shared_ptr<Outbox> outbox_;
    std::uint64_t data_bytes_;
    std::atomic<bool> is_draining_{false};
    std::atomic<bool> is_closing_{false};
    std::atomic<bool> is_condemned_{false};
    std::atomic<bool> is_proven_{false};
    std::atomic<bool> is_closed_{false};
    std::atomic<bool> is_released_{false};
    std::atomic<bool> has_given_back_{false};
    // Under the endpoint's mutex.
    Endpoint endpoint_;
    abi::fi_addr_t peer_ = 0;
    std::array<std::byte, kScratchBytes> zeros_{};
    std::unique_ptr<Region> zeros_region_;
    std::vector<Slot> slots_;
    std::vector<Slot*> free_slots_;
    const bool is_sink_here_;
    std::optional<MemoryView> memory_;  // nothing where the provider reads any memory
    std::vector<Piece> pieces_;         // taken
    std::size_t next_piece_ = 0;
    std::size_t num_pieces_ = 0;
    std::size_t hint_ = 0;
    bool is_probed_ = false;
    bool is_blocked_ = false;  // the provider takes nothing right now
    std::optional<Error> failure_;
    bool is_ours_ = false;      // the failure: no other path would fare better
    bool is_reported_ = false;  // the failure
    bool is_told_ = false;      // that it is proven
    bool is_stalled_ = false;
    Clock::time_point moved_time_{};  // the last completion, or when nothing was in flight
    Clock::time_point asked_time_{};  // when the remote was told that nothing moves
};

class OfiRemote final : public RemotePort, public std::enable_shared_from_this<OfiRemote> {
  public:
    using Rails = std::vector<std::shared_ptr<Rail>>;

    OfiRemote(net::Reactor& reactor, const Rails& rails, std::shared_ptr<const LocalMemory> memory,
              std::shared_ptr<RemoteInfo> info, std::unique_ptr<net::Channel> channel);
    ~OfiRemote() override { close(); }
    // After construction: opens the paths and proves them. Those that cannot be built are tried
    // again later, as long as one works. Throws kTimeout, kPeer, kFenced, kRail.
    void start(const TargetView& view, const Deadline& deadline);

    [[nodiscard]] const std::shared_ptr<RemoteInfo>& info() const noexcept override {
        return info_;
    }
    void post(std::shared_ptr<Operation> operation) override;
    void notify(std::span<const std::int32_t> immediates) override;
    void close() noexcept override;

    // The worst state of the paths over a rail of ours; "idle" without any.
    [[nodiscard]] std::string_view state_of(std::size_t rail) const;

    // Paths tell, on their rail's thread.
    enum class News : std::uint8_t {
        kProven,
        kFailed,   // and closed
        kStalled,  // nothing has moved for a while: is the peer frozen, or the path dead?
        kClosed,   // after retire()
        kFatal,    // no path can send this
    };
    void tell(std::size_t path, std::uint64_t number, News news,
              std::optional<Error> error = std::nullopt) noexcept;

  private:
    struct Path {
        PathHealth health;
        std::shared_ptr<SourcePath> source;  // null while there is none
        std::size_t rail = 0;
        std::size_t sink_rail = 0;
        std::uint64_t sink_attempt = 0;  // of the sink's rail, that it was built for
        std::uint64_t number = 0;        // of the source
        bool is_settled = false;         // it was proven, or failed
        bool is_opening = false;         // the sink was asked for its rail
        Clock::time_point asked_time{};  // then, or when it was asked to fence it
    };
    struct Notice {
        std::size_t path;
        std::uint64_t number;
        News news;
        std::optional<Error> error;
    };

    // Throws what building an endpoint throws.
    void build(std::size_t index, std::shared_ptr<const TargetView::RailView> sink);
    void watch();
    // What follows runs on the reactor's thread.
    void on_control();
    void on_frame(const net::Frame& frame);
    void on_notices();
    void on_timer();
    void set_timer();
    void on_path_failed(std::size_t index, const Error& error);
    void ask_to_fence(Path& path);
    // `is_ours`: because we had asked.
    void on_rail_fenced(RailAttempt which, bool is_ours);
    void ask_to_open(std::size_t index);
    void on_rail_open(std::size_t rail, TargetView::RailView view);
    void on_refused(RailAttempt which);
    // A path could not be built: later again.
    void postpone(Path& path);
    void end_if_last();
    void send(FrameType type, std::span<const std::byte> payload);
    // Everything in flight is taken back and fails with the first error that came.
    void end(const Error& error) noexcept;

    net::Reactor& reactor_;
    const Rails rails_;
    std::shared_ptr<RemoteInfo> info_;
    std::unique_ptr<net::Channel> channel_;
    const std::shared_ptr<Outbox> outbox_ = std::make_shared<Outbox>();
    std::size_t num_sink_rails_ = 0;
    std::optional<RailReader> rail_reader_;
    std::optional<Error> last_failure_;  // of a path
    const EventFd notice_event_;
    const net::Timer timer_;
    std::vector<std::uint64_t> watches_;
    mutable std::mutex mutex_;  // paths' healths as others see them, notices_, error_
    std::vector<Path> paths_;
    std::vector<Notice> notices_;
    std::optional<Error> error_;
    std::atomic<bool> has_failed_{false};
    std::atomic<bool> is_closed_{false};
    std::atomic<std::size_t> num_settled_{0};
    std::atomic<bool> is_proven_{false};  // one of them
    WakeWord changed_;
};

}  // namespace weightsync::ofi
