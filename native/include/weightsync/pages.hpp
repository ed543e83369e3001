// Pages: many pieces of one length, named by their numbers.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include <weightsync/ranges.hpp>

namespace weightsync {

// Page i begins at offset + indices[i] * stride.
struct Pages {
    std::span<const std::int64_t> indices;
    std::int64_t stride = 0;
    std::uint64_t offset = 0;  // source: an address; destination: arena bytes
};

struct PagedWrite {
    std::uint64_t page_bytes = 0;
    Pages source;
    Pages destination;
    // Of each page; or, when empty, page i has first_immediate + i: consecutive chunks of a slot.
    std::span<const std::int64_t> immediates;
    std::int64_t first_immediate = kNoImmediate;
};

// One row per page, in the order of the pages. Throws kConfig for lists of different lengths,
// negative indices or strides, addresses beyond 64 bits, and chunks that leave the slot of
// first_immediate. Bounds of the memory are not looked at.
[[nodiscard]] std::vector<Write> expand_pages(const PagedWrite& pages, int chunk_bits);

}  // namespace weightsync
