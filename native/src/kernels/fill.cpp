#include "fill.hpp"

#include <atomic>
#include <cstring>
#include <utility>

namespace weightsync::kernels {

namespace {

// Calls run(address, n, stride) for every innermost run, which is the one with the smallest stride;
// stops at the first false.
template <class Run>
bool for_each_run(FillRow row, const Run& run) {
    for (int d = 0; d + 1 < kDims; ++d) {
        const bool is_nearer = std::abs(row.stride[d]) < std::abs(row.stride[kDims - 1]);
        if (row.n[d] > 1 && (row.n[kDims - 1] == 1 || is_nearer)) {
            std::swap(row.n[d], row.n[kDims - 1]);
            std::swap(row.stride[d], row.stride[kDims - 1]);
        }
    }
    for (std::int64_t i = 0; i < row.n[0]; ++i) {
        for (std::int64_t j = 0; j < row.n[1]; ++j) {
            for (std::int64_t k = 0; k < row.n[2]; ++k) {
                std::byte* at = row.dst + i * row.stride[0] + j * row.stride[1] + k * row.stride[2];
                if (!run(at, row.n[3], row.stride[3])) {
                    return false;
                }
            }
        }
    }
    return true;
}

template <class Code>
void fill_row(const FillRow& row, Code code) {
    for_each_run(row, [code](std::byte* at, std::int64_t n, std::int64_t stride) {
        if (stride == sizeof(Code)) {  // a loop of its own, so that the compiler vectorises it
            for (std::int64_t i = 0; i < n; ++i) {
                std::memcpy(at + i * static_cast<std::int64_t>(sizeof(Code)), &code, sizeof(Code));
            }
        } else {
            for (std::int64_t i = 0; i < n; ++i) {
                std::memcpy(at + i * stride, &code, sizeof(Code));
            }
        }
        return true;
    });
}

template <class Code>
bool is_filled(const FillRow& row, Code code) {
    return for_each_run(row, [code](const std::byte* at, std::int64_t n, std::int64_t stride) {
        Code difference = 0;
        for (std::int64_t i = 0; i < n; ++i) {
            Code found = 0;
            std::memcpy(&found, at + i * stride, sizeof(Code));
            difference = static_cast<Code>(difference | (found ^ code));
        }
        return difference == 0;
    });
}

// Calls visit(row, code) with the code in the unsigned type of the row's item size.
template <class Visit>
auto with_code(const FillRow& row, std::uint64_t code, const Visit& visit) {
    switch (itemsize(row.dtype)) {
        case 1:
            return visit(row, static_cast<std::uint8_t>(code));
        case 2:
            return visit(row, static_cast<std::uint16_t>(code));
        case 4:
            return visit(row, static_cast<std::uint32_t>(code));
        default:
            return visit(row, code);
    }
}

}  // namespace

FillRow FillRow::load(const std::int64_t* columns) noexcept {
    FillRow row;
    row.dst = reinterpret_cast<std::byte*>(columns[0]);
    row.dtype = static_cast<Dtype>(columns[1]);
    for (int d = 0; d < kDims; ++d) {
        row.n[d] = columns[2 + d];
        row.stride[d] = columns[6 + d];
    }
    return row;
}

const char* check_fill_row(const std::int64_t* columns) noexcept {
    if (!is_dtype(columns[1])) {
        return "unknown dtype number";
    }
    return std::any_of(columns + 2, columns + 6, [](std::int64_t n) { return n < 0; })
               ? "negative size"
               : nullptr;
}

void fill(std::span<const std::int64_t> table, std::span<const std::uint64_t> codes, int threads) {
    for_each_row(
        static_cast<std::int64_t>(codes.size()), threads,
        [&](std::int64_t i) { return FillRow::load(table.data() + i * kFillColumns); },
        [&](std::int64_t i, const FillRow& row) {
            with_code(row, codes[static_cast<std::size_t>(i)],
                      [](const FillRow& part, auto code) { fill_row(part, code); });
        });
}

std::int64_t check_fill(std::span<const std::int64_t> table, std::span<const std::uint64_t> codes,
                        int threads) {
    const auto num_rows = static_cast<std::int64_t>(codes.size());
    std::atomic<std::int64_t> first_bad{num_rows};
    for_each_row(
        num_rows, threads,
        [&](std::int64_t i) { return FillRow::load(table.data() + i * kFillColumns); },
        [&](std::int64_t i, const FillRow& row) {
            if (i >= first_bad.load(std::memory_order_relaxed)) {
                return;
            }
            const bool is_good =
                with_code(row, codes[static_cast<std::size_t>(i)],
                          [](const FillRow& part, auto code) { return is_filled(part, code); });
            if (!is_good) {
                std::int64_t known = first_bad.load();
                while (i < known && !first_bad.compare_exchange_weak(known, i)) {
                }
            }
        });
    return first_bad == num_rows ? -1 : first_bad.load();
}

}  // namespace weightsync::kernels
