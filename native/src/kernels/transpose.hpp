// Two-dimensional transposes: source contiguous along one loop, destination along the other.
#pragma once

#include <cstddef>
#include <cstdint>

namespace weightsync::kernels {

// dst[r * dst_stride + c * size] = src[c * src_stride + r * size] for r < rows, c < columns:
// source runs follow r, destination runs follow c. Strides in bytes.
struct Transpose {
    const std::byte* src;
    std::byte* dst;
    std::int64_t rows;
    std::int64_t columns;
    std::int64_t src_stride;
    std::int64_t dst_stride;
};

// Items of 1, 2, 4 or 8 bytes.
void run_transpose(const Transpose& transpose, std::int64_t size) noexcept;

}  // namespace weightsync::kernels
