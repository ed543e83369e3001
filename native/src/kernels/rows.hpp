// Splitting tables of rows (strided N-D boxes) into tasks of similar size.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "pool.hpp"

namespace weightsync::kernels {

inline constexpr int kDims = 4;

// A Row has: n[kDims]; size_bytes(); order_stride(d), by which memory is walked; slice(d, lo, n).

// Calls visit(part) for parts of at most `max_bytes` that make up the row, in memory order. Cuts
// along the last dim fall on multiples of kLastDimGrain so that vector loops keep full lines.
inline constexpr std::int64_t kLastDimGrain = 4096;

template <class Row, class Visit>
void for_each_part(const Row& row, std::int64_t max_bytes, const Visit& visit) {
    const std::int64_t bytes = row.size_bytes();
    int dim = -1;
    for (int d = 0; d < kDims; ++d) {
        if (row.n[d] > 1 && (dim < 0 || row.order_stride(d) > row.order_stride(dim))) {
            dim = d;
        }
    }
    if (bytes <= max_bytes || dim < 0) {
        visit(row);
        return;
    }
    const std::int64_t n = row.n[dim];
    const std::int64_t num_parts = std::min(n, (bytes + max_bytes - 1) / max_bytes);
    std::int64_t step = (n + num_parts - 1) / num_parts;
    if (dim == kDims - 1 && n > 2 * kLastDimGrain) {
        step = (step + kLastDimGrain - 1) / kLastDimGrain * kLastDimGrain;
    }
    for (std::int64_t lo = 0; lo < n; lo += step) {
        for_each_part(row.slice(dim, lo, std::min(step, n - lo)), max_bytes, visit);
    }
}

// Calls visit(index, row) for every row, or for parts that make it up, on at most `threads`
// threads. `load(index)` makes the Row. threads == 1 costs nothing beyond the loop.
template <class Load, class Visit>
void for_each_row(std::int64_t num_rows, int threads, const Load& load, const Visit& visit) {
    // Below kMinTask waking a helper costs more than the work; above kMaxTask the tail is uneven.
    constexpr std::int64_t kMinTask = 128 << 10;
    constexpr std::int64_t kMaxTask = 4 << 20;
    std::int64_t total = 0;
    if (threads > 1) {
        for (std::int64_t i = 0; i < num_rows; ++i) {
            total += load(i).size_bytes();
        }
    }
    if (total < 2 * kMinTask) {
        for (std::int64_t i = 0; i < num_rows; ++i) {
            visit(i, load(i));
        }
        return;
    }
    using Row = decltype(load(0));
    struct Task {
        std::int64_t row_lo;
        std::int64_t row_hi;  // row_lo: only `part` of this row
        Row part;
    };
    const std::int64_t grain = std::clamp(total / (4 * threads), kMinTask, kMaxTask);
    std::vector<Task> tasks;
    std::int64_t first = 0;
    std::int64_t pending = 0;
    const auto flush = [&](std::int64_t end) {
        if (first < end) {
            tasks.push_back({first, end, Row{}});
        }
        first = end;
        pending = 0;
    };
    for (std::int64_t i = 0; i < num_rows; ++i) {
        const Row row = load(i);
        const std::int64_t bytes = row.size_bytes();
        if (bytes > grain) {
            flush(i);
            for_each_part(row, grain, [&](const Row& part) { tasks.push_back({i, i, part}); });
            first = i + 1;
        } else if ((pending += bytes) >= grain) {
            flush(i + 1);
        }
    }
    flush(num_rows);
    auto work = [&](std::int64_t index) {
        const Task& task = tasks[static_cast<std::size_t>(index)];
        if (task.row_lo == task.row_hi) {
            visit(task.row_lo, task.part);
        }
        for (std::int64_t i = task.row_lo; i < task.row_hi; ++i) {
            visit(i, load(i));
        }
    };
    run_tasks(static_cast<std::int64_t>(tasks.size()), threads, work);
}

}  // namespace weightsync::kernels
