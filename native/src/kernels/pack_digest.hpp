// Packing and digesting in one pass: the digest reads every tile while it is still in cache.
#pragma once

#include <cstdint>
#include <span>

#include "isa.hpp"

namespace weightsync::kernels {

// Columns of the digest side of a row: seed, lo[4], step[4].
inline constexpr std::int64_t kPackKeyColumns = 9;

// Why the digest side of a row is not valid, or nullptr.
[[nodiscard]] const char* check_pack_keys(const std::int64_t* keys) noexcept;

// The same as pack(table) followed by digest() of the destinations.
void pack_digest(std::span<const std::int64_t> table, std::span<const std::int64_t> keys,
                 std::span<const std::int32_t> group, std::span<std::uint64_t> sums, int threads,
                 Isa isa);

}  // namespace weightsync::kernels
