// Keys of the digest: which odd or short number multiplies which element. The definition is written
// out in weightsync/encodings/digest.py; this is the same arithmetic.
#pragma once

#include <array>
#include <cstdint>

namespace weightsync::kernels {

inline constexpr std::int64_t kSegment = 4096;  // units that share one H key; size of the C tables
inline constexpr int kKeyPadding = 64;  // vector loads may read this many keys past the last
inline constexpr int kLanes = 2;

// One step of splitmix64: the increment and the finaliser.
inline constexpr std::uint64_t kGamma = 0x9E3779B97F4A7C15U;

[[nodiscard]] constexpr std::uint64_t mix(std::uint64_t z) noexcept {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
    return z ^ (z >> 31);
}

// Numbers of the key families; a tensor's dims are 1 + dim.
enum class KeyFamily : std::uint64_t { kTensor = 0, kDim0 = 1, kDim1 = 2, kDim2 = 3, kRun = 4 };

// The keys of one family of one tensor: key(i) = mix(base + (i + 1) * kGamma), lanes in its halves.
// `state` is the argument of mix for the current index, so that a step costs one addition.
struct KeyStream {
    std::uint64_t state = 0;

    KeyStream() = default;
    KeyStream(std::uint64_t seed, KeyFamily family, std::int64_t index) noexcept
        : state(mix(seed + (static_cast<std::uint64_t>(family) + 1) * kGamma) +
                (static_cast<std::uint64_t>(index) + 1) * kGamma) {}
};

// Both lanes of a multiplier mod 2^32.
struct Multiplier {
    std::uint32_t lane0 = 1;
    std::uint32_t lane1 = 1;
};

[[nodiscard]] inline Multiplier key_at(std::uint64_t state) noexcept {
    const std::uint64_t key = mix(state);
    return {static_cast<std::uint32_t>(key) | 1U, static_cast<std::uint32_t>(key >> 32) | 1U};
}

[[nodiscard]] inline Multiplier operator*(Multiplier a, Multiplier b) noexcept {
    return {a.lane0 * b.lane0, a.lane1 * b.lane1};
}

// C_k: per lane distinct non-zero signed 16-bit keys. Distinct, so that a swap of two unequal units
// of one segment always changes the lane. Padded with zeros for vector loads past the end.
struct ShortKeys {
    alignas(64) std::array<std::int16_t, kSegment + kKeyPadding> lane[kLanes];
};

[[nodiscard]] const ShortKeys& short_keys() noexcept;

}  // namespace weightsync::kernels
