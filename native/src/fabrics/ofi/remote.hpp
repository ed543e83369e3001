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
#include <weightsync/send_queue.hpp>

#include "../../net/channel.hpp"
#include "../../net/reactor.hpp"
#include "rail.hpp"
#include "wire.hpp"

namespace weightsync::ofi {

class OfiRemote;

// What a path must know of the other end.
struct PathSpec {
    std::size_t index = 0;
    std::shared_ptr<Rail> rail;
    std::size_t rail_index = 0;
    std::shared_ptr<const TargetView> view;
    std::size_t sink_rail = 0;
    std::string peer;  // for messages
};

// One rail here to one rail of the sink: an endpoint of its own, so that closing it takes back all
// that was posted to this sink and nothing else.
class SourcePath final : public Pollable {
  public:
    SourcePath(PathSpec spec, std::weak_ptr<OfiRemote> remote, std::shared_ptr<SendQueue> queue,
               std::shared_ptr<const RangeTable> ranges, std::shared_ptr<const LocalMemory> memory);

    bool progress() noexcept override;
    [[nodiscard]] Rest rest() noexcept override;
    // There is work, or an end.
    void wake() noexcept;
    // Takes back all that was posted, gives its pieces back to the queue and leaves the rail. At
    // once, or when the provider lets go of our thread.
    void close() noexcept;
    // A first write has been answered.
    [[nodiscard]] bool is_proven() const noexcept { return is_proven_.load(); }
    [[nodiscard]] const std::string& label() const noexcept { return rail_label_; }

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
    [[nodiscard]] bool post_all();
    [[nodiscard]] bool post_piece(const Piece& piece);
    [[nodiscard]] bool post_probe();
    [[nodiscard]] ssize_t write(Slot& slot, const void* source, std::uint64_t nbytes, void* desc,
                                const RegionFrame& region, std::uint64_t offset,
                                std::uint64_t data) noexcept;
    void close_locked() noexcept;

    const std::size_t index_;
    std::shared_ptr<Rail> rail_;
    const std::size_t rail_index_;
    std::shared_ptr<const TargetView> view_;
    const TargetView::RailView& sink_;
    const std::string peer_label_;
    const std::string rail_label_;
    std::weak_ptr<OfiRemote> remote_;
    std::shared_ptr<SendQueue> queue_;
    std::shared_ptr<const RangeTable> ranges_;
    std::uint64_t data_bytes_;
    std::atomic<bool> is_woken_{true};
    std::atomic<bool> is_draining_{false};
    std::atomic<bool> is_closing_{false};
    std::atomic<bool> is_proven_{false};
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
    // The provider says that a write failed; the control connection is given time to say why.
    std::optional<Error> suspicion_;
    Deadline suspected_until_ = Deadline::never();
};

class OfiRemote final : public RemotePort, public std::enable_shared_from_this<OfiRemote> {
  public:
    OfiRemote(net::Reactor& reactor, std::shared_ptr<const LocalMemory> memory,
              std::shared_ptr<RemoteInfo> info, std::unique_ptr<net::Channel> channel);
    ~OfiRemote() override { close(); }
    // After construction: opens the paths and proves each. Throws kTimeout, kPeer, kFenced, kRail.
    void start(std::span<const std::shared_ptr<Rail>> rails,
               const std::shared_ptr<const TargetView>& view, const Deadline& deadline);

    [[nodiscard]] const std::shared_ptr<RemoteInfo>& info() const noexcept override {
        return info_;
    }
    void post(std::shared_ptr<Operation> operation) override;
    void notify(std::span<const std::int32_t> immediates) override;
    void close() noexcept override;

    // The end: everything in flight is taken back and fails with the first error that came.
    void fail(const Error& error) noexcept;
    // A path was proven, or the remote failed.
    void on_change() noexcept { weightsync::wake(changed_); }

  private:
    void on_control() noexcept;

    net::Reactor& reactor_;
    std::shared_ptr<const LocalMemory> memory_;
    std::shared_ptr<RemoteInfo> info_;
    std::unique_ptr<net::Channel> channel_;
    std::uint64_t watch_ = 0;
    std::shared_ptr<SendQueue> queue_;
    std::vector<std::shared_ptr<SourcePath>> paths_;
    std::mutex mutex_;  // error_, is_closed_
    std::optional<Error> error_;
    std::atomic<bool> has_failed_{false};
    std::atomic<bool> is_closed_{false};
    WakeWord changed_;
};

}  // namespace weightsync::ofi
