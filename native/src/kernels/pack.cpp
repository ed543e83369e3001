#include "pack.hpp"

#include <cstring>
#include <utility>

#include "casts.hpp"
#include "transpose.hpp"

namespace weightsync::kernels {

namespace {

// A row without its dims of size 1, outermost first by destination stride, neighbours merged.
struct Loops {
    int count = 0;
    std::int64_t n[kDims] = {1, 1, 1, 1};
    std::int64_t src[kDims] = {};
    std::int64_t dst[kDims] = {};

    void swap(int a, int b) noexcept {
        std::swap(n[a], n[b]);
        std::swap(src[a], src[b]);
        std::swap(dst[a], dst[b]);
    }
};

Loops make_loops(const PackRow& row) noexcept {
    Loops loops;
    int count = 0;
    for (int d = 0; d < kDims; ++d) {
        if (row.n[d] == 1) {
            continue;
        }
        int at = count++;
        loops.n[at] = row.n[d];
        loops.src[at] = row.src_stride[d];
        loops.dst[at] = row.dst_stride[d];
        for (; at > 0 && std::abs(loops.dst[at - 1]) < std::abs(loops.dst[at]); --at) {
            loops.swap(at - 1, at);
        }
    }
    int merged = 0;
    for (int d = 1; d < count; ++d) {
        if (loops.dst[merged] == loops.dst[d] * loops.n[d] &&
            loops.src[merged] == loops.src[d] * loops.n[d]) {
            loops.n[merged] *= loops.n[d];
        } else {
            ++merged;
            loops.n[merged] = loops.n[d];
        }
        loops.dst[merged] = loops.dst[d];
        loops.src[merged] = loops.src[d];
    }
    loops.count = count == 0 ? 0 : merged + 1;
    for (int d = loops.count; d < kDims; ++d) {
        loops.n[d] = 1;
        loops.src[d] = 0;
        loops.dst[d] = 0;
    }
    return loops;
}

// The two innermost loops; `outer` may have n == 1.
struct Plane {
    std::int64_t outer_n;
    std::int64_t outer_src;
    std::int64_t outer_dst;
    std::int64_t inner_n;
    std::int64_t inner_src;
    std::int64_t inner_dst;
};

template <std::int64_t kBytes>
void copy_fixed_runs(const std::byte* src, std::byte* dst, const Plane& plane) {
    for (std::int64_t i = 0; i < plane.outer_n; ++i) {
        std::memcpy(dst + i * plane.outer_dst, src + i * plane.outer_src, kBytes);
    }
}

void copy_runs(const std::byte* src, std::byte* dst, const Plane& plane, std::int64_t run_bytes) {
    switch (run_bytes) {  // a call of memcpy costs more than these copies
        case 1:
            return copy_fixed_runs<1>(src, dst, plane);
        case 2:
            return copy_fixed_runs<2>(src, dst, plane);
        case 4:
            return copy_fixed_runs<4>(src, dst, plane);
        case 8:
            return copy_fixed_runs<8>(src, dst, plane);
        case 16:
            return copy_fixed_runs<16>(src, dst, plane);
        case 32:
            return copy_fixed_runs<32>(src, dst, plane);
        case 64:
            return copy_fixed_runs<64>(src, dst, plane);
        default:
            break;
    }
    for (std::int64_t i = 0; i < plane.outer_n; ++i) {
        std::memcpy(dst + i * plane.outer_dst, src + i * plane.outer_src,
                    static_cast<std::size_t>(run_bytes));
    }
}

// Elementwise in blocks, so that lines of both sides are reused whichever way they run.
template <class Item>
void for_each_item(const Plane& plane, const Item& item) {
    constexpr std::int64_t kBlock = 64;
    for (std::int64_t i0 = 0; i0 < plane.outer_n; i0 += kBlock) {
        const std::int64_t i1 = std::min(i0 + kBlock, plane.outer_n);
        for (std::int64_t j0 = 0; j0 < plane.inner_n; j0 += kBlock) {
            const std::int64_t j1 = std::min(j0 + kBlock, plane.inner_n);
            for (std::int64_t i = i0; i < i1; ++i) {
                for (std::int64_t j = j0; j < j1; ++j) {
                    item(i * plane.outer_src + j * plane.inner_src,
                         i * plane.outer_dst + j * plane.inner_dst);
                }
            }
        }
    }
}

template <std::size_t kBytes>
void copy_items(const std::byte* src, std::byte* dst, const Plane& plane) {
    for_each_item(plane, [=](std::int64_t from, std::int64_t to) {
        std::memcpy(dst + to, src + from, kBytes);
    });
}

template <auto kCast, class From>
void cast_items(const std::byte* src, std::byte* dst, const Plane& plane) {
    for_each_item(plane, [=](std::int64_t from, std::int64_t to) {
        From bits = 0;
        std::memcpy(&bits, src + from, sizeof(bits));
        const auto code = kCast(bits);
        std::memcpy(dst + to, &code, sizeof(code));
    });
}

// One cast: item sizes, and how it is done on contiguous elements and on scattered ones.
struct Cast {
    std::int64_t src_size;
    std::int64_t dst_size;
    CastRun run;
    void (*items)(const std::byte* src, std::byte* dst, const Plane& plane);
};

Cast cast_of(Dtype from, Dtype to, Isa isa) noexcept {
    if (from == Dtype::kBF16) {
        return {2, 4, bf16_to_f32_run(isa), cast_items<bf16_to_f32, std::uint16_t>};
    }
    if (to == Dtype::kBF16) {
        return {4, 2, f32_to_bf16_run(isa), cast_items<f32_to_bf16, std::uint32_t>};
    }
    return {4, 2, f32_to_f16_run(isa), cast_items<f32_to_f16, std::uint32_t>};
}

void copy_plane(const std::byte* src, std::byte* dst, const Plane& plane, std::int64_t size) {
    if (plane.inner_src == size && plane.inner_dst == size) {
        return copy_runs(src, dst, plane, plane.inner_n * size);
    }
    if (plane.outer_src == size && plane.inner_dst == size) {
        return run_transpose(
            {src, dst, plane.outer_n, plane.inner_n, plane.inner_src, plane.outer_dst}, size);
    }
    switch (size) {
        case 1:
            return copy_items<1>(src, dst, plane);
        case 2:
            return copy_items<2>(src, dst, plane);
        case 4:
            return copy_items<4>(src, dst, plane);
        default:
            return copy_items<8>(src, dst, plane);
    }
}

void cast_plane(const std::byte* src, std::byte* dst, const Plane& plane, const Cast& cast) {
    const auto [size, dst_size, run, items] = cast;
    if (plane.inner_dst != dst_size) {
        return items(src, dst, plane);
    }
    if (plane.inner_src == size) {
        for (std::int64_t i = 0; i < plane.outer_n; ++i) {
            run(src + i * plane.outer_src, dst + i * plane.outer_dst, plane.inner_n);
        }
        return;
    }
    // Scattered: blocks are made dense first.
    constexpr std::int64_t kRows = 64;
    constexpr std::int64_t kColumns = 128;
    std::byte dense[4 * kRows * kColumns];  // no source has wider elements
    for (std::int64_t j = 0; j < plane.inner_n; j += kColumns) {
        const std::int64_t columns = std::min(kColumns, plane.inner_n - j);
        for (std::int64_t i = 0; i < plane.outer_n; i += kRows) {
            const std::int64_t rows = std::min(kRows, plane.outer_n - i);
            copy_plane(src + i * plane.outer_src + j * plane.inner_src, dense,
                       {rows, plane.outer_src, size * columns, columns, plane.inner_src, size},
                       size);
            for (std::int64_t r = 0; r < rows; ++r) {
                run(dense + size * r * columns, dst + (i + r) * plane.outer_dst + dst_size * j,
                    columns);
            }
        }
    }
}

// Chooses the two innermost loops: [count - 2] and [count - 1].
void order_inner(Loops& loops, std::int64_t src_size, std::int64_t dst_size) noexcept {
    const int inner = loops.count - 1;
    if (inner < 1 || (loops.src[inner] == src_size && loops.dst[inner] == dst_size)) {
        return;
    }
    for (int d = 0; d < inner; ++d) {  // a transpose: pair the loops that each side has contiguous
        if (loops.src[d] == src_size) {
            loops.swap(d, inner - 1);
            return;
        }
    }
    if (loops.n[inner] < 8 && loops.n[inner - 1] > loops.n[inner]) {
        loops.swap(inner - 1, inner);
    }
}

}  // namespace

PackRow PackRow::load(const std::int64_t* columns) noexcept {
    PackRow row;
    row.src = reinterpret_cast<const std::byte*>(columns[0]);
    row.dst = reinterpret_cast<std::byte*>(columns[1]);
    row.src_dtype = static_cast<Dtype>(columns[2]);
    row.dst_dtype = static_cast<Dtype>(columns[3]);
    for (int d = 0; d < kDims; ++d) {
        row.n[d] = columns[4 + d];
        row.src_stride[d] = columns[8 + d];
        row.dst_stride[d] = columns[12 + d];
    }
    return row;
}

const char* check_pack_row(const std::int64_t* columns) noexcept {
    if (!is_dtype(columns[2]) || !is_dtype(columns[3])) {
        return "unknown dtype number";
    }
    return std::any_of(columns + 4, columns + 8, [](std::int64_t n) { return n < 0; })
               ? "negative size"
               : nullptr;
}

const char* check_pack_cast(const std::int64_t* columns) noexcept {
    return is_cast_supported(static_cast<Dtype>(columns[2]), static_cast<Dtype>(columns[3]))
               ? nullptr
               : "no cast between these dtypes, only F32 -> BF16, F32 -> F16 and BF16 -> F32";
}

void pack_row(const PackRow& row, Isa isa) noexcept {
    if (row.size_bytes() == 0) {
        return;
    }
    const std::int64_t src_size = itemsize(row.src_dtype);
    const std::int64_t dst_size = itemsize(row.dst_dtype);
    const bool is_copy = row.src_dtype == row.dst_dtype;
    Loops loops = make_loops(row);
    if (loops.count <= 1 && is_copy &&
        (loops.count == 0 || (loops.src[0] == src_size && loops.dst[0] == src_size))) {
        std::memcpy(row.dst, row.src, static_cast<std::size_t>(loops.n[0] * src_size));
        return;
    }
    order_inner(loops, src_size, dst_size);
    // From here the loops sit at the end: [2] and [3] are the plane.
    for (int d = loops.count - 1, to = kDims - 1; to >= 0; --d, --to) {
        if (d >= 0) {
            loops.swap(d, to);
        }
    }
    if (loops.count == 0) {  // one cast element
        loops.src[3] = src_size;
        loops.dst[3] = dst_size;
    }
    const Plane plane{loops.n[2], loops.src[2], loops.dst[2],
                      loops.n[3], loops.src[3], loops.dst[3]};
    for (std::int64_t i = 0; i < loops.n[0]; ++i) {
        for (std::int64_t j = 0; j < loops.n[1]; ++j) {
            const std::byte* src = row.src + i * loops.src[0] + j * loops.src[1];
            std::byte* dst = row.dst + i * loops.dst[0] + j * loops.dst[1];
            if (is_copy) {
                copy_plane(src, dst, plane, src_size);
            } else {
                cast_plane(src, dst, plane, cast_of(row.src_dtype, row.dst_dtype, isa));
            }
        }
    }
}

void pack(std::span<const std::int64_t> table, int threads, Isa isa) {
    const auto num_rows = static_cast<std::int64_t>(table.size()) / kPackColumns;
    for_each_row(
        num_rows, threads,
        [&](std::int64_t i) { return PackRow::load(table.data() + i * kPackColumns); },
        [&](std::int64_t, const PackRow& row) { pack_row(row, isa); });
}

}  // namespace weightsync::kernels
