// Linear digest of stored codes, indexed by canonical element number: any cut of a tensor composes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>

#include "digest_dot.hpp"
#include "isa.hpp"
#include "rows.hpp"

namespace weightsync::kernels {

// Columns of a row: address, itemsize, seed, lo[4], step[4], n[4], stride_bytes[4]. Element
// i of the box is element lo + step * i of the tensor and lies at address + sum(stride * i).
inline constexpr std::int64_t kDigestColumns = 19;

struct DigestRow {
    const std::byte* data = nullptr;
    std::int64_t itemsize = 1;
    std::uint64_t seed = 0;
    std::int64_t lo[kDims] = {};
    std::int64_t step[kDims] = {};
    std::int64_t n[kDims] = {};
    std::int64_t stride[kDims] = {};

    [[nodiscard]] static DigestRow load(const std::int64_t* columns) noexcept;
    [[nodiscard]] std::int64_t size_bytes() const noexcept {
        return n[0] * n[1] * n[2] * n[3] * itemsize;
    }
    [[nodiscard]] std::int64_t order_stride(int dim) const noexcept {
        return std::abs(stride[dim]);
    }
    [[nodiscard]] DigestRow slice(int dim, std::int64_t first, std::int64_t count) const noexcept {
        DigestRow part = *this;
        part.data += first * stride[dim];
        part.lo[dim] += first * step[dim];
        part.n[dim] = count;
        return part;
    }
};

// Why a row is not valid, or nullptr.
[[nodiscard]] const char* check_digest_row(const std::int64_t* columns) noexcept;

// Both lanes of one box.
[[nodiscard]] Multiplier digest_row(const DigestRow& row, const DigestKernels& kernels) noexcept;

// Whether digest_copy_row can take a row, one run of bytes, that is to be copied to `copy`.
[[nodiscard]] bool can_digest_copy(const DigestRow& row, const std::byte* copy,
                                   const DigestKernels& kernels) noexcept;

// digest_row() that in the same pass copies the row, around the caches; they are globally visible
// after store_fence().
[[nodiscard]] Multiplier digest_copy_row(const DigestRow& row, std::byte* copy,
                                         const DigestKernels& kernels) noexcept;

// Lane sums by group; groups may be added to from several threads.
class GroupSums {
  public:
    // `sums` is zeroed by the caller; lane 1 in the upper half.
    GroupSums(std::span<std::uint64_t> sums, std::span<const std::int32_t> group,
              bool is_shared) noexcept
        : sums_(sums), group_(group), is_shared_(is_shared) {}

    void add(std::int64_t row, Multiplier lanes) noexcept;

  private:
    std::span<std::uint64_t> sums_;
    std::span<const std::int32_t> group_;
    bool is_shared_;
};

// Adds the digest of every row of a checked table into sums[group[row]], lanes separately.
void digest(std::span<const std::int64_t> table, std::span<const std::int32_t> group,
            std::span<std::uint64_t> sums, int threads, Isa isa);

}  // namespace weightsync::kernels
