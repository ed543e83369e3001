#include "digest_dot.hpp"

#include <cstring>

#include "intrinsics.hpp"

namespace weightsync::kernels {

namespace {

// Everything below is arithmetic mod 2^32. Products are at most 2^30 in magnitude, and a sum that
// wraps (also the one pair -32768 * -32768 * 2 inside pmaddwd) wraps to the right residue.

template <class Unit>
[[gnu::always_inline]] inline std::uint32_t load_unit(const std::byte* at) {
    Unit unit = 0;
    std::memcpy(&unit, at, sizeof(Unit));
    return static_cast<std::uint32_t>(static_cast<std::int32_t>(unit));
}

// The address may lie beyond the data: prefetches of unmapped memory are dropped.
[[gnu::always_inline]] inline void prefetch(const std::byte* at) {
    __builtin_prefetch(at);
}

// Plain loops; inlined into functions of each target, where the compiler vectorises them.
template <class Unit>
[[gnu::always_inline]] inline Multiplier dot_tail(const std::byte* data, const std::int16_t* keys0,
                                                  const std::int16_t* keys1, std::int64_t n) {
    Multiplier sum{0, 0};
    for (std::int64_t i = 0; i < n; ++i) {
        const std::uint32_t unit =
            load_unit<Unit>(data + i * static_cast<std::int64_t>(sizeof(Unit)));
        sum.lane0 += unit * static_cast<std::uint32_t>(static_cast<std::int32_t>(keys0[i]));
        sum.lane1 += unit * static_cast<std::uint32_t>(static_cast<std::int32_t>(keys1[i]));
    }
    return sum;
}

template <class Unit>
Multiplier strip_portable(const Strip& strip) {
    Multiplier sum{0, 0};
    std::uint64_t state = strip.state;
    const std::byte* data = strip.data;
    for (std::int64_t run = 0; run < strip.runs; ++run) {
        const Multiplier run_key = key_at(state);
        for (std::int64_t s = 0; s < strip.num_segments; ++s) {
            const Segment& segment = strip.segments[s];
            const Multiplier key = run_key * segment.key;
            const Multiplier dot =
                dot_tail<Unit>(data + segment.offset, segment.keys0, segment.keys1, segment.length);
            sum.lane0 += key.lane0 * dot.lane0;
            sum.lane1 += key.lane1 * dot.lane1;
        }
        state += strip.delta;
        data += strip.stride;
    }
    return sum;
}

constexpr DigestKernels kPortableKernels{strip_portable<std::uint8_t>, strip_portable<std::int16_t>,
                                         nullptr};

#if defined(__x86_64__)

#define WS_AVX2 __attribute__((target("avx2")))
#define WS_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))

template <class Unit>
WS_AVX2 inline __m256i load_units_256(const std::byte* at) {
    if constexpr (sizeof(Unit) == 1) {
        return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    } else {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    }
}

WS_AVX2 inline __m256i dot_256(__m256i units, const std::int16_t* keys) {
    return _mm256_madd_epi16(units, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys)));
}

WS_AVX2 inline std::uint32_t sum_256(__m256i v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4E));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xB1));
    return static_cast<std::uint32_t>(_mm_cvtsi128_si32(s));
}

template <class Unit, bool kCopy>
WS_AVX2 Multiplier strip_avx2(const Strip& strip) {
    constexpr auto kBytes = static_cast<std::int64_t>(sizeof(Unit));
    __m256i sum0 = _mm256_setzero_si256();
    __m256i sum1 = _mm256_setzero_si256();
    Multiplier tail{0, 0};
    std::uint64_t state = strip.state;
    const std::byte* data = strip.data;
    for (std::int64_t run = 0; run < strip.runs; ++run) {
        const Multiplier run_key = key_at(state);
        for (std::int64_t s = 0; s < strip.num_segments; ++s) {
            const Segment& segment = strip.segments[s];
            const std::byte* units = data + segment.offset;
            [[maybe_unused]] std::byte* copy = kCopy ? strip.copy + (units - strip.data) : nullptr;
            const std::int16_t* keys0 = segment.keys0;
            const std::int16_t* keys1 = segment.keys1;
            const std::int64_t length = segment.length;
            __m256i a0 = _mm256_setzero_si256();
            __m256i a1 = _mm256_setzero_si256();
            __m256i b0 = _mm256_setzero_si256();
            __m256i b1 = _mm256_setzero_si256();
            std::int64_t i = 0;
            for (; i + 32 <= length; i += 32) {
                prefetch(units + i * kBytes + strip.ahead);
                const __m256i x = load_units_256<Unit>(units + i * kBytes);
                const __m256i y = load_units_256<Unit>(units + (i + 16) * kBytes);
                if constexpr (kCopy) {
                    auto* to = reinterpret_cast<__m256i*>(copy + i * kBytes);
                    _mm256_stream_si256(to, x);
                    _mm256_stream_si256(to + 1, y);
                }
                a0 = _mm256_add_epi32(a0, dot_256(x, keys0 + i));
                a1 = _mm256_add_epi32(a1, dot_256(x, keys1 + i));
                b0 = _mm256_add_epi32(b0, dot_256(y, keys0 + i + 16));
                b1 = _mm256_add_epi32(b1, dot_256(y, keys1 + i + 16));
            }
            if (i + 16 <= length) {
                const __m256i x = load_units_256<Unit>(units + i * kBytes);
                a0 = _mm256_add_epi32(a0, dot_256(x, keys0 + i));
                a1 = _mm256_add_epi32(a1, dot_256(x, keys1 + i));
                i += 16;
            }
            const Multiplier key = run_key * segment.key;
            if (i < length) {
                const Multiplier rest =
                    dot_tail<Unit>(units + i * kBytes, keys0 + i, keys1 + i, length - i);
                tail.lane0 += key.lane0 * rest.lane0;
                tail.lane1 += key.lane1 * rest.lane1;
            }
            const __m256i key0 = _mm256_set1_epi32(static_cast<int>(key.lane0));
            const __m256i key1 = _mm256_set1_epi32(static_cast<int>(key.lane1));
            sum0 = _mm256_add_epi32(sum0, _mm256_mullo_epi32(_mm256_add_epi32(a0, b0), key0));
            sum1 = _mm256_add_epi32(sum1, _mm256_mullo_epi32(_mm256_add_epi32(a1, b1), key1));
        }
        state += strip.delta;
        data += strip.stride;
    }
    return {tail.lane0 + sum_256(sum0), tail.lane1 + sum_256(sum1)};
}

constexpr DigestKernels kAvx2Kernels{strip_avx2<std::uint8_t, false>,
                                     strip_avx2<std::int16_t, false>,
                                     strip_avx2<std::int16_t, true>};

template <class Unit>
WS_AVX512 inline __m512i load_units_512(const std::byte* at) {
    if constexpr (sizeof(Unit) == 1) {
        return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    } else {
        return _mm512_loadu_si512(at);
    }
}

template <class Unit>
WS_AVX512 inline __m512i load_first_units_512(const std::byte* at, std::int64_t n) {
    const auto mask = static_cast<__mmask32>((std::uint64_t{1} << n) - 1);
    if constexpr (sizeof(Unit) == 1) {
        return _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, at));
    } else {
        return _mm512_maskz_loadu_epi16(mask, at);
    }
}

// Not _mm512_reduce_add_epi32: GCC writes it as a sum of signed integers, where wrapping is
// undefined.
WS_AVX512 inline std::uint32_t sum_512(__m512i v) {
    return sum_256(_mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1)));
}

WS_AVX512 inline __m512i dot_512(__m512i units, const std::int16_t* keys) {
    return _mm512_madd_epi16(units, _mm512_loadu_si512(keys));
}

template <class Unit, bool kCopy>
WS_AVX512 Multiplier strip_avx512(const Strip& strip) {
    constexpr auto kBytes = static_cast<std::int64_t>(sizeof(Unit));
    if constexpr (kBytes == 2) {
        const bool is_aligned = reinterpret_cast<std::uintptr_t>(strip.data) % 64 == 0;
        if (!is_aligned && strip.segments[0].length >= 1024) {
            // Every load of memory would cross a line here, only every other one there: 10 %
            // faster.
            return strip_avx2<Unit, kCopy>(strip);
        }
    }
    __m512i sum0 = _mm512_setzero_si512();
    __m512i sum1 = _mm512_setzero_si512();
    std::uint64_t state = strip.state;
    const std::byte* data = strip.data;
    for (std::int64_t run = 0; run < strip.runs; ++run) {
        const Multiplier run_key = key_at(state);
        for (std::int64_t s = 0; s < strip.num_segments; ++s) {
            const Segment& segment = strip.segments[s];
            const std::byte* units = data + segment.offset;
            [[maybe_unused]] std::byte* copy = kCopy ? strip.copy + (units - strip.data) : nullptr;
            const std::int16_t* keys0 = segment.keys0;
            const std::int16_t* keys1 = segment.keys1;
            const std::int64_t length = segment.length;
            __m512i a0 = _mm512_setzero_si512();
            __m512i a1 = _mm512_setzero_si512();
            __m512i b0 = _mm512_setzero_si512();
            __m512i b1 = _mm512_setzero_si512();
            std::int64_t i = 0;
            for (; i + 64 <= length; i += 64) {
                prefetch(units + i * kBytes + strip.ahead);
                if constexpr (kBytes == 2) {
                    prefetch(units + i * kBytes + strip.ahead + 64);
                }
                const __m512i x = load_units_512<Unit>(units + i * kBytes);
                const __m512i y = load_units_512<Unit>(units + (i + 32) * kBytes);
                if constexpr (kCopy) {
                    _mm512_stream_si512(reinterpret_cast<__m512i*>(copy + i * kBytes), x);
                    _mm512_stream_si512(reinterpret_cast<__m512i*>(copy + (i + 32) * kBytes), y);
                }
                a0 = _mm512_add_epi32(a0, dot_512(x, keys0 + i));
                a1 = _mm512_add_epi32(a1, dot_512(x, keys1 + i));
                b0 = _mm512_add_epi32(b0, dot_512(y, keys0 + i + 32));
                b1 = _mm512_add_epi32(b1, dot_512(y, keys1 + i + 32));
            }
            if (i + 32 <= length) {
                const __m512i x = load_units_512<Unit>(units + i * kBytes);
                if constexpr (kCopy) {
                    _mm512_stream_si512(reinterpret_cast<__m512i*>(copy + i * kBytes), x);
                }
                a0 = _mm512_add_epi32(a0, dot_512(x, keys0 + i));
                a1 = _mm512_add_epi32(a1, dot_512(x, keys1 + i));
                i += 32;
            }
            if (i < length) {
                const __m512i y = load_first_units_512<Unit>(units + i * kBytes, length - i);
                b0 = _mm512_add_epi32(b0, dot_512(y, keys0 + i));
                b1 = _mm512_add_epi32(b1, dot_512(y, keys1 + i));
            }
            const Multiplier key = run_key * segment.key;
            const __m512i key0 = _mm512_set1_epi32(static_cast<int>(key.lane0));
            const __m512i key1 = _mm512_set1_epi32(static_cast<int>(key.lane1));
            sum0 = _mm512_add_epi32(sum0, _mm512_mullo_epi32(_mm512_add_epi32(a0, b0), key0));
            sum1 = _mm512_add_epi32(sum1, _mm512_mullo_epi32(_mm512_add_epi32(a1, b1), key1));
        }
        state += strip.delta;
        data += strip.stride;
    }
    return {sum_512(sum0), sum_512(sum1)};
}

constexpr DigestKernels kAvx512Kernels{strip_avx512<std::uint8_t, false>,
                                       strip_avx512<std::int16_t, false>,
                                       strip_avx512<std::int16_t, true>};

#undef WS_AVX2
#undef WS_AVX512

#endif

}  // namespace

const DigestKernels& digest_kernels(Isa isa) noexcept {
#if defined(__x86_64__)
    switch (isa) {
        case Isa::kAvx512:
            return kAvx512Kernels;
        case Isa::kAvx2:
            return kAvx2Kernels;
        case Isa::kPortable:
            return kPortableKernels;
    }
#endif
    static_cast<void>(isa);
    return kPortableKernels;
}

}  // namespace weightsync::kernels
