// Inner loops of the digest, one set per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "digest_keys.hpp"
#include "isa.hpp"

namespace weightsync::kernels {

// A stretch of units that share one run key (their number / kSegment is the same).
struct Segment {
    std::int64_t offset;        // bytes from the start of the run
    std::int64_t length;        // units, <= kSegment
    const std::int16_t* keys0;  // key of the first unit; readable up to 64 past the last
    const std::int16_t* keys1;
    Multiplier key;
};

// `runs` runs of the same segments, `stride` bytes apart.
struct Strip {
    const std::byte* data;
    std::int64_t stride;
    std::int64_t runs;
    std::uint64_t state;  // key state of the first run, see KeyStream
    std::uint64_t delta;  // added to it from run to run
    const Segment* segments;
    std::int64_t num_segments;
    std::int64_t ahead;         // bytes from what is read to what is prefetched
    std::byte* copy = nullptr;  // where strip16_copy stores data[0]; the rest lies likewise
};

// Sum over runs and segments of key(run) * key(segment) * (sum over units of unit * C).
using StripDot = Multiplier (*)(const Strip& strip);

struct DigestKernels {
    StripDot strip8;   // one-byte codes: zero-extended units
    StripDot strip16;  // all others: memory as signed 16-bit units
    // strip16 that also stores what it reads, around the caches; nullptr where there is none. Every
    // segment must be a multiple of kCopyUnits long and land on a multiple of kCopyAlignment.
    StripDot strip16_copy;
};
inline constexpr std::int64_t kCopyUnits = 32;
inline constexpr std::int64_t kCopyAlignment = 64;

[[nodiscard]] const DigestKernels& digest_kernels(Isa isa) noexcept;

}  // namespace weightsync::kernels
