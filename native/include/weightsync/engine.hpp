// The engine: memory, targets and remotes over one fabric. No rank, no master, any number of peers.
//
// Ownership: whoever holds a Memory, Lease, Target, Remote or Operation also holds the engine (the
// shared pointers given out carry it), so the order in which they are dropped cannot be wrong.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include <weightsync/fabric.hpp>
#include <weightsync/pages.hpp>

namespace weightsync {

// Ports, leases and engines of a parent are never dropped in a forked child: their threads are not
// there, and what they hold of devices and connections is the parent's own.
template <class Port>
void keep_for_ever(std::shared_ptr<Port> port) {
    [[maybe_unused]] const auto* kept = new std::shared_ptr<Port>(std::move(port));
}

class Engine;
class PeerGroup;
class ScatterOperation;
struct GroupOptions;

// Sink-owned memory that can be a push target; also a source, like any lease.
class Memory {
  public:
    Memory(EngineContext& context, std::uint64_t nbytes, bool prefault);
    ~Memory();
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    [[nodiscard]] std::byte* data() const noexcept { return block_->data(); }
    [[nodiscard]] std::uint64_t nbytes() const noexcept { return block_->nbytes(); }
    [[nodiscard]] const std::shared_ptr<Block>& block() const noexcept { return block_; }
    [[nodiscard]] const std::shared_ptr<LeaseState>& lease() const noexcept { return lease_; }

  private:
    EngineContext& context_;
    std::shared_ptr<Block> block_;
    std::shared_ptr<LeaseState> lease_;
};

class Lease {
  public:
    Lease(EngineContext& context, std::shared_ptr<LeaseState> state)
        : context_(context), state_(std::move(state)) {}
    ~Lease();
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    [[nodiscard]] const std::shared_ptr<LeaseState>& state() const noexcept { return state_; }
    // Waits for operations that read it; see LeaseTable::release.
    void release(const Deadline& deadline);

  private:
    EngineContext& context_;
    std::shared_ptr<LeaseState> state_;
};

// One range to export: of a Memory or of a Lease.
struct RangeRequest {
    std::uint64_t arena_offset = 0;
    std::shared_ptr<LeaseState> lease;
    std::shared_ptr<Block> block;  // null for private memory
    std::uint64_t offset = 0;      // inside the lease or memory
    std::uint64_t nbytes = 0;
};

class Target : Counted<Kind::kTarget> {
  public:
    Target(EngineContext& context, std::shared_ptr<TargetPort> port, std::uint64_t generation,
           std::vector<RangeRequest> ranges);
    ~Target();

    [[nodiscard]] std::vector<std::byte> descriptor() const;
    [[nodiscard]] std::uint64_t generation() const noexcept { return generation_; }
    [[nodiscard]] std::uint32_t num_slots() const noexcept { return slots_->num_slots(); }
    // Throws kTimeout naming the missing chunks, kFenced after fence().
    void wait(std::span<const std::int32_t> slots, const Deadline& deadline);
    [[nodiscard]] bool is_complete(std::span<const std::int32_t> slots) const;
    // Slots that became complete since the last poll, each returned once until its reset. Blocks
    // until there is one or the deadline passes; empty then.
    [[nodiscard]] std::vector<std::int64_t> poll(const Deadline& deadline);
    [[nodiscard]] std::vector<std::int64_t> missing(std::int32_t slot) const;
    void reset(std::span<const std::int32_t> slots);
    // Counters: complete from `count` arrivals on, those before this call included.
    void expect_count(std::int64_t counter, std::int64_t count);
    [[nodiscard]] std::uint64_t count(std::int64_t counter) const;
    // For what is built on slots. One slot, without checks and errors: reads atomics only.
    [[nodiscard]] bool has_arrived(std::int32_t slot) const noexcept {
        return port_->board().is_complete(static_cast<std::uint32_t>(slot));
    }
    // Blocks until ready(), which is looked at whenever a slot fills up; false when the deadline
    // passed first. Throws like wait() when the target is fenced or closed.
    [[nodiscard]] bool wait_for(const std::function<bool()>& ready, const Deadline& deadline);
    // Makes all waiters look again.
    void wake_waiters() noexcept {
        [[maybe_unused]] const bool was_any = wake(port_->board().header().wake);
    }
    void flush();
    void fence(bool discard);
    void close() noexcept;
    [[nodiscard]] bool is_open() const noexcept { return state_.load() == kOpen; }
    // Ask for the engine's eventfd to be written when slots fill up.
    void arm(bool on) noexcept;
    // What this target counted, in the order of kCountNames.
    [[nodiscard]] std::array<std::uint64_t, kCountNames.size()> counters() const noexcept;

  private:
    enum State : std::uint8_t { kOpen, kFenced, kClosed };
    void check_open(const char* what) const;
    void check_slot(std::int64_t slot) const;
    void check_counter(std::int64_t slot) const;
    void let_go() noexcept;
    [[noreturn]] void throw_timeout(std::span<const std::int32_t> slots, double seconds) const;

    EngineContext& context_;
    std::shared_ptr<TargetPort> port_;
    std::shared_ptr<const SlotTable> slots_;
    std::uint64_t generation_;
    std::vector<RangeRequest> ranges_;  // keeps memory and leases
    std::atomic<State> state_{kOpen};
    std::mutex mutex_;  // fence, close, reset and the final counts
    std::unique_ptr<std::atomic<bool>[]> is_reported_;
    std::array<std::uint64_t, kCountNames.size()> final_counts_{};
};

class Remote : Counted<Kind::kRemote> {
  public:
    Remote(EngineContext& context, std::shared_ptr<RemotePort> port);
    ~Remote();

    [[nodiscard]] const RemoteInfo& info() const noexcept { return *port_->info(); }
    [[nodiscard]] std::uint64_t mapped_address() const noexcept;
    // Bounds and leases are checked before anything is written.
    [[nodiscard]] std::shared_ptr<Operation> post(std::span<const Write> rows);
    // One row per page; checked like post.
    [[nodiscard]] std::shared_ptr<Operation> write_paged(const PagedWrite& pages);
    // `nbytes`: how much was stored, for the counters only.
    void notify(std::span<const std::int32_t> immediates, std::uint64_t nbytes);
    void close() noexcept;
    [[nodiscard]] bool is_open() const noexcept { return is_open_.load(); }

  private:
    friend class Engine;
    // The halves of post: check and pin, then go.
    [[nodiscard]] std::vector<LeaseState*> prepare(std::span<const Write> rows) const;
    [[nodiscard]] std::shared_ptr<Operation> start(std::vector<Write> rows,
                                                   std::vector<LeaseState*> pins);

    EngineContext& context_;
    std::shared_ptr<RemotePort> port_;
    std::atomic<bool> is_open_{true};
};

class Engine : public std::enable_shared_from_this<Engine>, Counted<Kind::kEngine> {
  public:
    using MakeFabric = std::function<std::unique_ptr<Fabric>(EngineContext&)>;
    [[nodiscard]] static std::shared_ptr<Engine> open(std::string name, const MakeFabric& make);
    // Use open().
    Engine(std::string name, const MakeFabric& make);
    ~Engine();

    [[nodiscard]] const std::string& name() const noexcept { return context_.name; }
    [[nodiscard]] std::string_view fabric_name() const noexcept { return fabric_->name(); }
    [[nodiscard]] std::shared_ptr<Memory> allocate(std::uint64_t nbytes, bool prefault);
    [[nodiscard]] std::shared_ptr<Lease> add_lease(std::uint64_t address, std::uint64_t nbytes,
                                                   std::shared_ptr<void> owner);
    [[nodiscard]] std::shared_ptr<Target> export_target(std::vector<RangeRequest> ranges,
                                                        std::span<const std::int32_t> num_chunks,
                                                        int chunk_bits, std::uint64_t generation);
    [[nodiscard]] std::shared_ptr<Remote> connect(std::span<const std::byte> descriptor,
                                                  const Deadline& deadline);
    // Posts row i to remotes[peers[i]]. All rows are checked before any is written.
    [[nodiscard]] std::shared_ptr<ScatterOperation> scatter(
        std::span<const std::shared_ptr<Remote>> remotes, std::span<const Write> rows,
        std::span<const std::int32_t> peers);
    // This process' part of a group of peers that tell each other small things.
    [[nodiscard]] std::shared_ptr<PeerGroup> open_group(const GroupOptions& options);
    // Sums over the engine and all targets it ever had, in the order of kCountNames.
    [[nodiscard]] std::vector<std::uint64_t> counters();
    [[nodiscard]] std::vector<RailInfo> rails() { return fabric_->rails(); }

    // For event loops: the eventfd is written on progress while armed.
    [[nodiscard]] int progress_fd() const noexcept { return context_.progress.event.get(); }
    void arm(bool on);
    void drain_progress() noexcept { context_.progress.event.drain(); }
    [[nodiscard]] bool is_driven() const noexcept { return fabric_->is_driven(); }
    bool drive() { return fabric_->drive(); }

    // Closes remotes and targets and ends the threads; idempotent.
    void close() noexcept;
    [[nodiscard]] bool is_open() const noexcept { return is_open_.load(); }

  private:
    // Refuses calls on a closed engine and in forked children, and drops what calls left behind.
    void begin_call();

    EngineContext context_;
    std::unique_ptr<Fabric> fabric_;
    std::atomic<bool> is_open_{true};
    std::mutex mutex_;
    std::vector<std::weak_ptr<Target>> targets_;
    std::vector<std::weak_ptr<Remote>> remotes_;
};

// Keeps the parent alive as long as the object, and destroys the object first.
template <class Parent, class Object>
[[nodiscard]] std::shared_ptr<Object> with_parent(std::shared_ptr<Parent> parent,
                                                  std::shared_ptr<Object> object) {
    struct Pair {
        std::shared_ptr<Parent> parent;
        std::shared_ptr<Object> object;
    };
    Object* raw = object.get();
    return std::shared_ptr<Object>(
        std::make_shared<Pair>(Pair{std::move(parent), std::move(object)}), raw);
}

}  // namespace weightsync
