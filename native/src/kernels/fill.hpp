// Constants: writing one code into every element of a box, and checking that it is there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>

#include "dtypes.hpp"
#include "rows.hpp"

namespace weightsync::kernels {

// Columns of a row: dst_address, dtype, n[4], stride_bytes[4].
inline constexpr std::int64_t kFillColumns = 10;

struct FillRow {
    std::byte* dst = nullptr;
    Dtype dtype = Dtype::kU8;
    std::int64_t n[kDims] = {};
    std::int64_t stride[kDims] = {};

    [[nodiscard]] static FillRow load(const std::int64_t* columns) noexcept;
    [[nodiscard]] std::int64_t size_bytes() const noexcept {
        return n[0] * n[1] * n[2] * n[3] * itemsize(dtype);
    }
    [[nodiscard]] std::int64_t order_stride(int dim) const noexcept {
        return std::abs(stride[dim]);
    }
    [[nodiscard]] FillRow slice(int dim, std::int64_t lo, std::int64_t count) const noexcept {
        FillRow part = *this;
        part.dst += lo * stride[dim];
        part.n[dim] = count;
        return part;
    }
};

// Why a row is not valid, or nullptr.
[[nodiscard]] const char* check_fill_row(const std::int64_t* columns) noexcept;

// Writes the low itemsize bytes of codes[r] into every element of row r of a checked table.
void fill(std::span<const std::int64_t> table, std::span<const std::uint64_t> codes, int threads);

// The first row with an element that differs from its code, or -1.
[[nodiscard]] std::int64_t check_fill(std::span<const std::int64_t> table,
                                      std::span<const std::uint64_t> codes, int threads);

}  // namespace weightsync::kernels
