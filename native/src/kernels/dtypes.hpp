// Element types of buffers. The numbers are those of weightsync.ir.dtypes.Dtype.
#pragma once

#include <cstdint>

namespace weightsync::kernels {

enum class Dtype : std::int64_t {
    kBool,
    kU8,
    kI8,
    kF8E4M3,
    kF8E5M2,
    kU16,
    kI16,
    kF16,
    kBF16,
    kU32,
    kI32,
    kF32,
    kU64,
    kI64,
    kF64,
};

inline constexpr std::int64_t kNumDtypes = 15;

[[nodiscard]] constexpr bool is_dtype(std::int64_t code) noexcept {
    return code >= 0 && code < kNumDtypes;
}

[[nodiscard]] constexpr std::int64_t itemsize(Dtype dtype) noexcept {
    switch (dtype) {
        case Dtype::kBool:
        case Dtype::kU8:
        case Dtype::kI8:
        case Dtype::kF8E4M3:
        case Dtype::kF8E5M2:
            return 1;
        case Dtype::kU16:
        case Dtype::kI16:
        case Dtype::kF16:
        case Dtype::kBF16:
            return 2;
        case Dtype::kU32:
        case Dtype::kI32:
        case Dtype::kF32:
            return 4;
        case Dtype::kU64:
        case Dtype::kI64:
        case Dtype::kF64:
            return 8;
    }
    return 0;
}

// Everything else is refused: a silent change of type is never what a plan means.
[[nodiscard]] constexpr bool is_cast_supported(Dtype from, Dtype to) noexcept {
    return from == to || (from == Dtype::kF32 && (to == Dtype::kBF16 || to == Dtype::kF16)) ||
           (from == Dtype::kBF16 && to == Dtype::kF32);
}

}  // namespace weightsync::kernels
