#include "casts.hpp"

#include <cstring>

#include "intrinsics.hpp"

namespace weightsync::kernels {

namespace {

template <auto kCast, class From = std::uint32_t>
inline void cast_tail(const std::byte* src, std::byte* dst, std::int64_t n) {
    constexpr auto kFrom = static_cast<std::int64_t>(sizeof(From));
    for (std::int64_t i = 0; i < n; ++i) {
        From bits = 0;
        std::memcpy(&bits, src + kFrom * i, sizeof(bits));
        const auto code = kCast(bits);
        std::memcpy(dst + static_cast<std::int64_t>(sizeof(code)) * i, &code, sizeof(code));
    }
}

void bf16_portable(const std::byte* src, std::byte* dst, std::int64_t n) {
    cast_tail<f32_to_bf16>(src, dst, n);
}

void f16_portable(const std::byte* src, std::byte* dst, std::int64_t n) {
    cast_tail<f32_to_f16>(src, dst, n);
}

void widen_portable(const std::byte* src, std::byte* dst, std::int64_t n) {
    cast_tail<bf16_to_f32, std::uint16_t>(src, dst, n);
}

#if defined(__x86_64__)

// AVX512-BF16's own conversion is not used: it flushes denormals.
__attribute__((target("avx2"))) inline __m256i round_bf16(__m256i bits) {
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF));
    const __m256i is_nan = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7F800000));
    return _mm256_or_si256(rounded, _mm256_srli_epi32(is_nan, 16));
}

__attribute__((target("avx2"))) void bf16_avx2(const std::byte* src, std::byte* dst,
                                               std::int64_t n) {
    std::int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const auto* in = reinterpret_cast<const __m256i*>(src + 4 * i);
        const __m256i packed = _mm256_packus_epi32(round_bf16(_mm256_loadu_si256(in)),
                                                   round_bf16(_mm256_loadu_si256(in + 1)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + 2 * i),
                            _mm256_permute4x64_epi64(packed, 0xD8));
    }
    cast_tail<f32_to_bf16>(src + 4 * i, dst + 2 * i, n - i);
}

__attribute__((target("avx512f,avx512bw,avx512vl"))) inline __m256i round_bf16(__m512i bits) {
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
    const __mmask16 is_nan = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x7F800000));
    return _mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(rounded, is_nan, 0xFFFF));
}

__attribute__((target("avx512f,avx512bw,avx512vl"))) void bf16_avx512(const std::byte* src,
                                                                      std::byte* dst,
                                                                      std::int64_t n) {
    std::int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + 2 * i),
                            round_bf16(_mm512_loadu_si512(src + 4 * i)));
    }
    if (i < n) {
        const auto mask = static_cast<__mmask16>((1 << (n - i)) - 1);
        const __m512i bits = _mm512_maskz_loadu_epi32(mask, src + 4 * i);
        _mm256_mask_storeu_epi16(dst + 2 * i, mask, round_bf16(bits));
    }
}

__attribute__((target("avx2,f16c"))) void f16_avx2(const std::byte* src, std::byte* dst,
                                                   std::int64_t n) {
    std::int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 value = _mm256_loadu_ps(reinterpret_cast<const float*>(src + 4 * i));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + 2 * i),
                         _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    }
    cast_tail<f32_to_f16>(src + 4 * i, dst + 2 * i, n - i);
}

__attribute__((target("avx512f,avx512bw,avx512vl"))) void f16_avx512(const std::byte* src,
                                                                     std::byte* dst,
                                                                     std::int64_t n) {
    std::int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        _mm256_storeu_si256(
            reinterpret_cast<__m256i*>(dst + 2 * i),
            _mm512_cvtps_ph(_mm512_loadu_ps(src + 4 * i), _MM_FROUND_TO_NEAREST_INT));
    }
    if (i < n) {
        const auto mask = static_cast<__mmask16>((1 << (n - i)) - 1);
        const __m512 value = _mm512_maskz_loadu_ps(mask, src + 4 * i);
        _mm256_mask_storeu_epi16(dst + 2 * i, mask,
                                 _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    }
}

__attribute__((target("avx2"))) void widen_avx2(const std::byte* src, std::byte* dst,
                                                std::int64_t n) {
    std::int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + 2 * i));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + 4 * i),
                            _mm256_slli_epi32(_mm256_cvtepu16_epi32(codes), 16));
    }
    cast_tail<bf16_to_f32, std::uint16_t>(src + 2 * i, dst + 4 * i, n - i);
}

__attribute__((target("avx512f,avx512bw,avx512vl"))) void widen_avx512(const std::byte* src,
                                                                       std::byte* dst,
                                                                       std::int64_t n) {
    std::int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + 2 * i));
        _mm512_storeu_si512(dst + 4 * i, _mm512_slli_epi32(_mm512_cvtepu16_epi32(codes), 16));
    }
    if (i < n) {
        const auto mask = static_cast<__mmask16>((1 << (n - i)) - 1);
        const __m256i codes = _mm256_maskz_loadu_epi16(mask, src + 2 * i);
        _mm512_mask_storeu_epi32(dst + 4 * i, mask,
                                 _mm512_slli_epi32(_mm512_cvtepu16_epi32(codes), 16));
    }
}

#endif

}  // namespace

CastRun f32_to_bf16_run(Isa isa) noexcept {
#if defined(__x86_64__)
    switch (isa) {
        case Isa::kAvx512:
            return bf16_avx512;
        case Isa::kAvx2:
            return bf16_avx2;
        case Isa::kPortable:
            return bf16_portable;
    }
#endif
    static_cast<void>(isa);
    return bf16_portable;
}

CastRun f32_to_f16_run(Isa isa) noexcept {
#if defined(__x86_64__)
    switch (isa) {
        case Isa::kAvx512:
            return f16_avx512;
        case Isa::kAvx2:
            return f16_avx2;
        case Isa::kPortable:
            return f16_portable;
    }
#endif
    static_cast<void>(isa);
    return f16_portable;
}

CastRun bf16_to_f32_run(Isa isa) noexcept {
#if defined(__x86_64__)
    switch (isa) {
        case Isa::kAvx512:
            return widen_avx512;
        case Isa::kAvx2:
            return widen_avx2;
        case Isa::kPortable:
            return widen_portable;
    }
#endif
    static_cast<void>(isa);
    return widen_portable;
}

}  // namespace weightsync::kernels
