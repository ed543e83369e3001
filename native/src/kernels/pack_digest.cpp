#include "pack_digest.hpp"

#include <algorithm>

#include <weightsync/copy.hpp>

#include "digest.hpp"
#include "pack.hpp"

namespace weightsync::kernels {

namespace {

// Half of a 1 MiB L2 holds source and destination of a tile.
constexpr std::int64_t kTileBytes = 256 << 10;

// A pack row that carries the canonical index of its elements.
struct KeyedRow : PackRow {
    std::uint64_t seed = 0;
    std::int64_t lo[kDims] = {};
    std::int64_t step[kDims] = {};

    [[nodiscard]] KeyedRow slice(int dim, std::int64_t first, std::int64_t count) const noexcept {
        KeyedRow part = *this;
        static_cast<PackRow&>(part) = PackRow::slice(dim, first, count);
        part.lo[dim] += first * step[dim];
        return part;
    }

    // Whether it is one run of bytes that stay as they are.
    [[nodiscard]] bool is_run() const noexcept {
        std::int64_t run = itemsize(src_dtype);
        for (int d = kDims - 1; d >= 0; --d) {
            if (n[d] != 1 && (src_stride[d] != run || dst_stride[d] != run)) {
                return false;
            }
            run *= n[d];
        }
        return src_dtype == dst_dtype;
    }

    [[nodiscard]] DigestRow digest_of(const std::byte* data) const noexcept {
        DigestRow row;
        row.data = data;
        row.itemsize = itemsize(dst_dtype);
        row.seed = seed;
        std::copy_n(lo, kDims, row.lo);
        std::copy_n(step, kDims, row.step);
        std::copy_n(n, kDims, row.n);
        std::copy_n(dst_stride, kDims, row.stride);
        return row;
    }
};

KeyedRow load_row(const std::int64_t* columns, const std::int64_t* keys) noexcept {
    KeyedRow row;
    static_cast<PackRow&>(row) = PackRow::load(columns);
    row.seed = static_cast<std::uint64_t>(keys[0]);
    std::copy_n(keys + 1, kDims, row.lo);
    std::copy_n(keys + 5, kDims, row.step);
    return row;
}

}  // namespace

const char* check_pack_keys(const std::int64_t* keys) noexcept {
    if (std::any_of(keys + 1, keys + 5, [](std::int64_t lo) { return lo < 0; })) {
        return "negative index";
    }
    return std::any_of(keys + 5, keys + 9, [](std::int64_t step) { return step < 1; })
               ? "step below 1"
               : nullptr;
}

void pack_digest(std::span<const std::int64_t> table, std::span<const std::int64_t> keys,
                 std::span<const std::int32_t> group, std::span<std::uint64_t> sums, int threads,
                 Isa isa) {
    const DigestKernels& kernels = digest_kernels(isa);
    GroupSums groups(sums, group, threads > 1);
    for_each_row(
        static_cast<std::int64_t>(group.size()), threads,
        [&](std::int64_t i) {
            return load_row(table.data() + i * kPackColumns, keys.data() + i * kPackKeyColumns);
        },
        [&](std::int64_t i, const KeyedRow& row) {
            const auto nbytes = static_cast<std::uint64_t>(row.size_bytes());
            const bool is_long_run = nbytes >= kStreamBytes && row.is_run();
            if (is_long_run && can_digest_copy(row.digest_of(row.src), row.dst, kernels)) {
                groups.add(i, digest_copy_row(row.digest_of(row.src), row.dst, kernels));
                store_fence();
                return;
            }
            for_each_part(row, kTileBytes, [&](const KeyedRow& part) {
                if (is_long_run) {
                    // The source is in cache after its digest, the destination never is.
                    groups.add(i, digest_row(part.digest_of(part.src), kernels));
                    copy_bytes(part.dst, part.src, static_cast<std::uint64_t>(part.size_bytes()));
                    return;
                }
                pack_row(part, isa);
                groups.add(i, digest_row(part.digest_of(part.dst), kernels));
            });
        });
}

}  // namespace weightsync::kernels
