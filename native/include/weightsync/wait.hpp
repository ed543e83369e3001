// Adaptive waiting: a short spin, then a futex. Wakers pay a system call only when someone sleeps.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

#include <weightsync/os.hpp>

namespace weightsync {

// Lives in private or in shared memory. The order that makes it work: a waker makes its condition
// true by a sequentially consistent store or RMW and then reads `sleepers`; a sleeper raises
// `sleepers` and then reads the condition. One of the two sees the other.
struct WakeWord {
    std::atomic<std::uint32_t> sequence{0};
    std::atomic<std::uint32_t> sleepers{0};
};

void futex_sleep(const std::atomic<std::uint32_t>& word, std::uint32_t expected,
                 std::chrono::nanoseconds timeout) noexcept;
void futex_wake_all(const std::atomic<std::uint32_t>& word) noexcept;

// Wake whoever sleeps; true when someone did.
inline bool wake(WakeWord& word) noexcept {
    if (word.sleepers.load(std::memory_order_seq_cst) == 0) {
        return false;
    }
    word.sequence.fetch_add(1, std::memory_order_seq_cst);
    futex_wake_all(word.sequence);
    return true;
}

inline void cpu_relax() noexcept {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Longer than a wake-up across cores, shorter than a scheduler tick: a waiter that guesses wrong
// costs the other threads of a full machine next to nothing.
inline constexpr std::chrono::microseconds kSpin{20};

// Wait until ready() or the deadline; returns ready(). `ready` reads atomics and does not throw.
template <class Ready>
[[nodiscard]] bool wait_until(WakeWord& word, const Ready& ready, const Deadline& deadline) {
    if (ready()) {
        return true;
    }
    if (deadline.passed()) {
        return ready();  // once more, as every wait looks after its deadline
    }
    const auto spin_end = Deadline::Clock::now() + kSpin;
    do {
        for (int i = 0; i < 32; ++i) {
            cpu_relax();
        }
        if (ready()) {
            return true;
        }
    } while (Deadline::Clock::now() < spin_end);
    while (!deadline.passed()) {
        word.sleepers.fetch_add(1, std::memory_order_seq_cst);
        const std::uint32_t seen = word.sequence.load(std::memory_order_seq_cst);
        const bool is_ready = ready();
        if (!is_ready) {
            futex_sleep(word.sequence, seen, deadline.remaining(kSlice));
        }
        word.sleepers.fetch_sub(1, std::memory_order_seq_cst);
        if (is_ready || ready()) {
            return true;
        }
        check_interrupt();
    }
    return ready();
}

}  // namespace weightsync
