#include "transpose.hpp"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>  // SSE2 is part of x86-64: no dispatch needed
#endif

namespace weightsync::kernels {

namespace {

constexpr std::int64_t kLineBytes = 64;
constexpr std::int64_t kVectorBytes = 16;

#if defined(__x86_64__)

__m128i load(const std::byte* at) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
}

void store(std::byte* at, __m128i value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), value);
}

template <std::int64_t kSize>
__m128i interleave_low(__m128i a, __m128i b) {
    if constexpr (kSize == 1) {
        return _mm_unpacklo_epi8(a, b);
    } else if constexpr (kSize == 2) {
        return _mm_unpacklo_epi16(a, b);
    } else if constexpr (kSize == 4) {
        return _mm_unpacklo_epi32(a, b);
    } else {
        return _mm_unpacklo_epi64(a, b);
    }
}

template <std::int64_t kSize>
__m128i interleave_high(__m128i a, __m128i b) {
    if constexpr (kSize == 1) {
        return _mm_unpackhi_epi8(a, b);
    } else if constexpr (kSize == 2) {
        return _mm_unpackhi_epi16(a, b);
    } else if constexpr (kSize == 4) {
        return _mm_unpackhi_epi32(a, b);
    } else {
        return _mm_unpackhi_epi64(a, b);
    }
}

// A square of 16-byte runs. Interleaving the first half of the runs with the second rotates the
// bits of (run, item) by one place; after log2(side) rounds run and item have changed places.
template <std::int64_t kSize>
void transpose_square(const std::byte* src, std::byte* dst, std::int64_t from, std::int64_t to) {
    constexpr int kSide = kVectorBytes / kSize;
    __m128i a[kSide];
    __m128i b[kSide];
    for (int i = 0; i < kSide; ++i) {
        a[i] = load(src + i * from);
    }
    for (int round = 1; round < kSide; round *= 2) {
        for (int i = 0; i < kSide / 2; ++i) {
            b[2 * i] = interleave_low<kSize>(a[i], a[i + kSide / 2]);
            b[2 * i + 1] = interleave_high<kSize>(a[i], a[i + kSide / 2]);
        }
        std::copy(b, b + kSide, a);
    }
    for (int i = 0; i < kSide; ++i) {
        store(dst + i * to, a[i]);
    }
}

#else

template <std::int64_t kSize>
void transpose_square(const std::byte* src, std::byte* dst, std::int64_t from, std::int64_t to) {
    constexpr std::int64_t kSide = kVectorBytes / kSize;
    for (std::int64_t r = 0; r < kSide; ++r) {
        for (std::int64_t c = 0; c < kSide; ++c) {
            std::memcpy(dst + r * to + c * kSize, src + c * from + r * kSize, kSize);
        }
    }
}

#endif

template <std::int64_t kSize>
void transpose_items(const Transpose& t, std::int64_t r0, std::int64_t r1, std::int64_t c0,
                     std::int64_t c1) {
    for (std::int64_t r = r0; r < r1; ++r) {
        for (std::int64_t c = c0; c < c1; ++c) {
            std::memcpy(t.dst + r * t.dst_stride + c * kSize, t.src + c * t.src_stride + r * kSize,
                        kSize);
        }
    }
}

// One cache line of each of `kItems` source runs becomes one line of each of kItems destination
// runs. Through a small buffer, so that every line is read once and written once, in full: with
// strides of a power of two all lines of a tile fall into the same cache set.
template <std::int64_t kSize>
void transpose_tile(const std::byte* src, std::byte* dst, std::int64_t from, std::int64_t to) {
    constexpr std::int64_t kItems = kLineBytes / kSize;
    constexpr std::int64_t kSide = kVectorBytes / kSize;
    alignas(64) std::byte tile[kItems * kLineBytes];
    for (std::int64_t i = 0; i < kItems; ++i) {
        __builtin_prefetch(src + (kItems + i) *
                                     from);  // the next tile's lines, each on a page of its own
    }
    for (std::int64_t c = 0; c < kItems; c += kSide) {
        for (std::int64_t r = 0; r < kItems; r += kSide) {
            transpose_square<kSize>(src + c * from + r * kSize, tile + r * kLineBytes + c * kSize,
                                    from, kLineBytes);
        }
    }
    for (std::int64_t r = 0; r < kItems; ++r) {
        std::memcpy(dst + r * to, tile + r * kLineBytes, kLineBytes);
    }
}

template <std::int64_t kSize>
void transpose_blocks(const Transpose& t) {
    constexpr std::int64_t kItems = kLineBytes / kSize;
    // Neighbouring lines of the same pages are taken together: this many runs fit the TLB and L2.
    constexpr std::int64_t kBlock = 1024;
    const std::int64_t rows = t.rows / kItems * kItems;
    const std::int64_t columns = t.columns / kItems * kItems;
    for (std::int64_t c0 = 0; c0 < columns; c0 += kBlock) {
        for (std::int64_t r0 = 0; r0 < rows; r0 += kBlock) {
            for (std::int64_t r = r0; r < std::min(r0 + kBlock, rows); r += kItems) {
                for (std::int64_t c = c0; c < std::min(c0 + kBlock, columns); c += kItems) {
                    transpose_tile<kSize>(t.src + c * t.src_stride + r * kSize,
                                          t.dst + r * t.dst_stride + c * kSize, t.src_stride,
                                          t.dst_stride);
                }
            }
        }
    }
    transpose_items<kSize>(t, 0, t.rows, columns, t.columns);
    transpose_items<kSize>(t, rows, t.rows, 0, columns);
}

}  // namespace

void run_transpose(const Transpose& transpose, std::int64_t size) noexcept {
    switch (size) {
        case 1:
            return transpose_blocks<1>(transpose);
        case 2:
            return transpose_blocks<2>(transpose);
        case 4:
            return transpose_blocks<4>(transpose);
        default:
            return transpose_blocks<8>(transpose);
    }
}

}  // namespace weightsync::kernels
