// Strided N-D copies with casts: how plan rows move from a source buffer into staging.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>

#include "dtypes.hpp"
#include "isa.hpp"
#include "rows.hpp"

namespace weightsync::kernels {

// Columns of a row: src_address, dst_address, src_dtype, dst_dtype, n[4], src_stride_bytes[4],
// dst_stride_bytes[4].
inline constexpr std::int64_t kPackColumns = 16;

struct PackRow {
    const std::byte* src = nullptr;
    std::byte* dst = nullptr;
    Dtype src_dtype = Dtype::kU8;
    Dtype dst_dtype = Dtype::kU8;
    std::int64_t n[kDims] = {};
    std::int64_t src_stride[kDims] = {};
    std::int64_t dst_stride[kDims] = {};

    [[nodiscard]] static PackRow load(const std::int64_t* columns) noexcept;
    [[nodiscard]] std::int64_t size_bytes() const noexcept {
        return n[0] * n[1] * n[2] * n[3] * itemsize(dst_dtype);
    }
    [[nodiscard]] std::int64_t order_stride(int dim) const noexcept {
        return std::abs(dst_stride[dim]);
    }
    [[nodiscard]] PackRow slice(int dim, std::int64_t lo, std::int64_t count) const noexcept {
        PackRow part = *this;
        part.src += lo * src_stride[dim];
        part.dst += lo * dst_stride[dim];
        part.n[dim] = count;
        return part;
    }
};

// Why a row is not valid, or nullptr. Addresses are not (and cannot be) checked.
[[nodiscard]] const char* check_pack_row(const std::int64_t* columns) noexcept;

// Why a valid row cannot be cast, or nullptr.
[[nodiscard]] const char* check_pack_cast(const std::int64_t* columns) noexcept;

void pack_row(const PackRow& row, Isa isa) noexcept;

// Copies every row of a checked table (num_rows x kPackColumns). Destinations must be disjoint.
void pack(std::span<const std::int64_t> table, int threads, Isa isa);

}  // namespace weightsync::kernels
