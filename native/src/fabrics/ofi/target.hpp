// The sink's end of the ofi fabrics.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include <weightsync/fabric.hpp>

#include "../../net/channel.hpp"
#include "../../net/listener.hpp"
#include "rail.hpp"
#include "wire.hpp"

namespace weightsync::ofi {

// Sink memory under a second address, for a provider whose writers store into this address space by
// themselves: what a fence must take from them is the address, since they ask nobody. The owner's
// address stays, and the range that writers know stays reserved until the last of them is gone.
class Alias : Counted<Kind::kMapping> {
  public:
    explicit Alias(const Block& block);
    ~Alias();
    Alias(const Alias&) = delete;
    Alias& operator=(const Alias&) = delete;
    [[nodiscard]] std::byte* data() const noexcept { return data_; }
    // What is stored there from now on lands in pages that nobody reads.
    void revoke() noexcept;
    // Somebody may still write there: the range is never given back to the system.
    void keep_reserved() noexcept { is_kept_ = true; }

  private:
    std::byte* data_ = nullptr;
    std::uint64_t nbytes_ = 0;
    bool is_kept_ = false;
};

// One rail of a target: an endpoint of its own, which a fence closes without touching other
// targets.
class TargetEnd final : public Pollable {
  public:
    // `addresses`: of the exported ranges and at last of the scratch bytes, as writers see them.
    TargetEnd(std::shared_ptr<Rail> rail, std::span<const ExportedRange> ranges,
              std::vector<std::uint64_t> addresses, std::shared_ptr<Board> board);

    [[nodiscard]] TargetView::RailView view() const;
    [[nodiscard]] const std::shared_ptr<Rail>& rail() const noexcept { return rail_; }
    void set_expecting(bool is_expecting) noexcept { is_expecting_ = is_expecting; }
    bool progress() noexcept override;
    [[nodiscard]] Rest rest() noexcept override;
    // What has arrived until close() counts: the target lives on. Before close().
    void keep_arrivals() noexcept { keeps_arrivals_ = true; }
    // Regions and endpoint; true when it was done, false when the provider holds our thread: the
    // rail does it when that returns.
    bool close(std::chrono::milliseconds patience) noexcept;

  private:
    void arrive(std::span<const abi::fi_cq_data_entry> entries) noexcept;
    void close_locked() noexcept;
    // Takes what the completion queue holds; false when there was nothing.
    bool take_batch() noexcept;
    void take_rest() noexcept;

    std::shared_ptr<Rail> rail_;
    std::shared_ptr<Board> board_;
    Endpoint endpoint_;
    std::vector<std::unique_ptr<Region>> regions_;  // of the ranges, then of the scratch bytes
    std::vector<std::uint64_t> addresses_;
    std::uint64_t data_bytes_;
    std::atomic<bool> is_expecting_{false};
    std::atomic<bool> keeps_arrivals_{false};
    std::atomic<bool> is_closing_{false};
    bool is_broken_ = false;
};

class OfiTarget final : public TargetPort, public std::enable_shared_from_this<OfiTarget> {
  public:
    OfiTarget(EngineContext& context, net::Reactor& reactor, net::Listener& listener,
              std::span<const std::shared_ptr<Rail>> rails, TargetSpec spec);
    ~OfiTarget() override { close(); }
    // After construction.
    void start();

    [[nodiscard]] Board& board() noexcept override { return *board_; }
    [[nodiscard]] std::vector<std::byte> descriptor() const override {
        return descriptor_.encode();
    }
    void fence(bool discard) override;
    void close() noexcept override;

  private:
    // One connected source. Held by the reactor until it hangs up, longer than the target where
    // that ends first.
    struct Session : Counted<Kind::kSession> {
        explicit Session(UniqueFd socket) : channel(std::move(socket)) {}
        ~Session();
        net::Channel channel;
        std::uint64_t id = 0;
        std::uint64_t watch = 0;
        bool has_hung_up = false;
        std::vector<std::shared_ptr<Alias>> aliases;
    };
    // One rail of the target; another end each time it is opened.
    struct RailSlot {
        std::shared_ptr<TargetEnd> end;  // null: fenced
        std::uint64_t attempt = 0;
        TargetView::RailView view;  // of that attempt
    };
    void accept(net::Accepted accepted);
    // False to hang up.
    [[nodiscard]] bool on_event(Session& session);
    void on_frame(Session& session, const net::Frame& frame);
    void fence_rail(Session& session, RailAttempt which);
    void open_rail(Session& session, RailAttempt which);
    // Builds an end where there is none; with mutex_ held. Throws what that throws.
    void build(std::size_t rail);
    void forget(std::uint64_t session) noexcept;
    // Tells all sources and closes the door. False when that was done before.
    bool shut(FrameType why) noexcept;
    void close_ends() noexcept;

    EngineContext& context_;
    net::Reactor& reactor_;
    net::Listener& listener_;
    std::vector<std::shared_ptr<Rail>> rails_;
    TargetSpec spec_;
    Descriptor descriptor_;
    std::shared_ptr<Block> scratch_;
    std::shared_ptr<Board> board_;
    std::vector<std::uint64_t> addresses_;  // of the ranges and the scratch, as writers see them
    std::vector<std::shared_ptr<Block>> blocks_;
    std::vector<std::shared_ptr<Alias>> aliases_;  // by block; empty where none is needed
    std::mutex mutex_;                             // what follows
    std::vector<RailSlot> slots_;                  // by rail
    bool is_shut_ = false;
    std::uint64_t next_session_ = 1;
    std::unordered_map<std::uint64_t, std::shared_ptr<Session>> sessions_;
};

}  // namespace weightsync::ofi
