// Writes, and the ranges of a sink that may be written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace weightsync {

// One row of the table that a source posts; the layout of an int64 (W, 4) array.
struct Write {
    std::uint64_t source;       // address in the source's process
    std::uint64_t destination;  // arena bytes of the sink
    std::uint64_t nbytes;
    std::int64_t immediate;  // slot << chunk_bits | chunk, or kNoImmediate
};
static_assert(sizeof(Write) == 4 * sizeof(std::int64_t));

inline constexpr std::int64_t kNoImmediate = -1;
// No arena and no address is larger: sums of two of them cannot overflow.
inline constexpr std::uint64_t kMaxBytes = std::uint64_t{1} << 56;
// Rows of one post; more is a mistake of the caller.
inline constexpr std::uint64_t kMaxRows = std::uint64_t{1} << 22;

// A writable part of a sink's arena.
struct Range {
    std::uint64_t arena_offset = 0;
    std::uint64_t nbytes = 0;
    // Where the fabric finds the first byte: an address of this process for local and sim.
    std::uint64_t base = 0;
};

// Sorted, disjoint ranges with a fast check of whole batches.
class RangeTable {
  public:
    RangeTable() = default;
    // Throws kConfig for overlaps, empty or absurd ranges.
    explicit RangeTable(std::vector<Range> ranges);

    [[nodiscard]] std::span<const Range> ranges() const noexcept { return ranges_; }
    // Bytes from the start of the arena to the end of its last range.
    [[nodiscard]] std::uint64_t arena_nbytes() const noexcept { return arena_nbytes_; }
    // The range that holds all of [offset, offset + nbytes), or null. `hint` is where the last
    // search ended: neighbours in a batch cost one comparison.
    [[nodiscard]] const Range* find(std::uint64_t offset, std::uint64_t nbytes,
                                    std::size_t& hint) const noexcept;
    // Throws kConfig naming the first row that leaves the ranges or has a bad immediate.
    void check(std::span<const Write> rows, const std::string& peer) const;
    // base - arena_offset when it is the same for all ranges (one block of memory), else 0.
    [[nodiscard]] std::uint64_t common_base() const noexcept;

  private:
    std::vector<Range> ranges_;
    std::uint64_t arena_nbytes_ = 0;
};

// Total payload of a batch.
[[nodiscard]] std::uint64_t total_bytes(std::span<const Write> rows) noexcept;

}  // namespace weightsync
