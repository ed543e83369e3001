// What a fabric implements. The core (engine.hpp) checks arguments and bounds, keeps leases and
// counts; a fabric moves bytes, sets bits and fences. Adding one touches no core file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include <weightsync/board.hpp>
#include <weightsync/memory.hpp>
#include <weightsync/operation.hpp>
#include <weightsync/rails.hpp>
#include <weightsync/ranges.hpp>

namespace weightsync {

struct ExportedRange {
    std::uint64_t arena_offset = 0;
    std::uint64_t nbytes = 0;
    std::uint64_t address = 0;  // in the sink's process
    // The block it lies in and where, or null for private (leased) memory.
    std::shared_ptr<Block> block;
    std::uint64_t block_offset = 0;
};

struct TargetSpec {
    std::uint64_t generation = 0;
    std::shared_ptr<const SlotTable> slots;
    std::vector<ExportedRange> exported;
    RangeTable ranges;  // base: address in the sink's process
    // Where arrivals are marked when other ports of the same target mark them too.
    std::optional<Board> shared_board;

    // The board of a port in private memory.
    [[nodiscard]] Board make_board(int event_fd) const {
        return shared_board ? *shared_board : Board::in_heap(slots, event_fd);
    }
};

// The sink's end. Owned by a Target.
class TargetPort {
  public:
    virtual ~TargetPort() = default;
    [[nodiscard]] virtual Board& board() noexcept = 0;
    // What connect() of a peer needs; without the common header.
    [[nodiscard]] virtual std::vector<std::byte> descriptor() const = 0;
    // After it returns no byte of the target changes through the fabric any more. Never waits for a
    // peer. `discard`: the contents need not survive.
    virtual void fence(bool discard) = 0;
    // Makes arrived bytes readable.
    virtual void flush() {}
    // Lets go of peers. Not a fence: a peer may still write memory that it can reach.
    virtual void close() noexcept = 0;
};

// The source's end. Owned by a Remote and by operations in flight.
class RemotePort {
  public:
    virtual ~RemotePort() = default;
    [[nodiscard]] virtual const std::shared_ptr<RemoteInfo>& info() const noexcept = 0;
    // Where arena offset 0 is mapped in this process, or 0.
    [[nodiscard]] virtual std::uint64_t mapped_address() const noexcept { return 0; }
    // Starts the writes; rows are within bounds and pinned. Finishes the operation exactly once,
    // maybe before it returns. Does not throw for reasons of the peer: those fail the operation.
    virtual void post(std::shared_ptr<Operation> operation) = 0;
    // Announces bytes that were stored through mapped_address().
    virtual void notify(std::span<const std::int32_t> immediates) = 0;
    // Fails operations that have not begun, waits for those that have, lets go of the peer.
    virtual void close() noexcept = 0;
};

class Fabric {
  public:
    virtual ~Fabric() = default;
    [[nodiscard]] virtual std::string_view name() const noexcept = 0;
    [[nodiscard]] virtual std::shared_ptr<TargetPort> export_target(TargetSpec spec) = 0;
    [[nodiscard]] virtual std::shared_ptr<RemotePort> connect(std::span<const std::byte> descriptor,
                                                              const Deadline& deadline) = 0;
    // Blocks until ready() or the deadline; returns ready().
    [[nodiscard]] virtual bool wait(WakeWord& word, const std::function<bool()>& ready,
                                    const Deadline& deadline) {
        return wait_until(word, ready, deadline);
    }
    // A fabric without threads of its own moves only inside waits and drive(); true when it did.
    [[nodiscard]] virtual bool is_driven() const noexcept { return false; }
    virtual bool drive() { return false; }
    // What goes over each NIC; empty for a fabric that uses none.
    [[nodiscard]] virtual std::vector<RailInfo> rails() { return {}; }
    // Ends all threads. Called once, after all ports are closed.
    virtual void stop() noexcept = 0;
};

}  // namespace weightsync
