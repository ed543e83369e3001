// Casts of stored codes, bit-exact on every instruction set.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "isa.hpp"

namespace weightsync::kernels {

// Float codes to bfloat16 codes, round to nearest even. Every NaN becomes 0xFFFF, which is what
// torch's vectorised CPU cast of contiguous tensors gives.
[[nodiscard]] constexpr std::uint16_t f32_to_bf16(std::uint32_t bits) noexcept {
    const std::uint32_t rounded = (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16;
    return static_cast<std::uint16_t>((bits & 0x7FFFFFFFU) > 0x7F800000U ? 0xFFFFU : rounded);
}

// Float codes to IEEE half codes, round to nearest even, denormals kept, overflow to infinity. A
// NaN keeps its sign and upper mantissa bits and is made quiet, as F16C (and torch with it) does.
[[nodiscard]] constexpr std::uint16_t f32_to_f16(std::uint32_t bits) noexcept {
    const std::uint32_t sign = (bits >> 16) & 0x8000U;
    const std::uint32_t a = bits & 0x7FFFFFFFU;
    std::uint32_t half = 0;
    if (a > 0x7F800000U) {
        half = 0x7E00U | ((a >> 13) & 0x3FFU);
    } else if (a >= 0x477FF000U) {  // 65520, the first value that rounds to 2^16
        half = 0x7C00U;
    } else if (a >= 0x38800000U) {  // 2^-14, the smallest normal half
        half = (a + 0xFFFU + ((a >> 13) & 1U) - 0x38000000U) >> 13;
    } else if (a > 0x33000000U) {  // above 2^-25, which itself ties to 0
        const std::uint32_t mantissa = (a & 0x7FFFFFU) | 0x800000U;
        const std::uint32_t shift = 126U - (a >> 23);
        half = mantissa >> shift;
        const std::uint32_t rest = mantissa & ((1U << shift) - 1U);
        const std::uint32_t tie = 1U << (shift - 1U);
        half += (rest > tie || (rest == tie && (half & 1U) != 0)) ? 1U : 0U;
    }
    return static_cast<std::uint16_t>(sign | half);
}

// bfloat16 codes to float codes: exact, NaNs keep their bits.
[[nodiscard]] constexpr std::uint32_t bf16_to_f32(std::uint16_t code) noexcept {
    return static_cast<std::uint32_t>(code) << 16;
}

// Casts `n` contiguous elements; addresses need no alignment; the ranges must not overlap.
using CastRun = void (*)(const std::byte* src, std::byte* dst, std::int64_t n);

[[nodiscard]] CastRun f32_to_bf16_run(Isa isa) noexcept;
[[nodiscard]] CastRun f32_to_f16_run(Isa isa) noexcept;
[[nodiscard]] CastRun bf16_to_f32_run(Isa isa) noexcept;

}  // namespace weightsync::kernels
