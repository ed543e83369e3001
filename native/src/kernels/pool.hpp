// A small persistent thread pool that splits one call's tasks over the caller and helpers.
#pragma once

#include <cstdint>

namespace weightsync::kernels {

// Processors this process may run on (its affinity mask), at least 1.
[[nodiscard]] int num_processors() noexcept;

// Calls task(context, index) for every index in [0, num_tasks) exactly once and returns when all
// calls have returned. The caller works too; at most `threads` threads (capped at num_processors())
// run at once. One call at a time has the helpers: a concurrent one runs alone in its caller, so
// that kernels called from several threads never oversubscribe the machine. `task` must not throw
// and must not call run_tasks. Safe after fork (the child starts helpers of its own).
void run_tasks(std::int64_t num_tasks, int threads, void (*task)(void*, std::int64_t),
               void* context);

template <class Task>
void run_tasks(std::int64_t num_tasks, int threads, Task& task) {
    run_tasks(
        num_tasks, threads,
        [](void* context, std::int64_t index) { (*static_cast<Task*>(context))(index); }, &task);
}

}  // namespace weightsync::kernels
