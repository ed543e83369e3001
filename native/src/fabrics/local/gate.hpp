// Lets work in until it is closed, and closes only when all that got in has left.
#pragma once

#include <atomic>
#include <cstdint>

#include <weightsync/wait.hpp>

namespace weightsync::local {

class Gate {
  public:
    [[nodiscard]] bool enter() noexcept {
        // Sequentially consistent against close(): either this sees the closed gate, or the one
        // who closes sees this one inside.
        inside_.fetch_add(1, std::memory_order_seq_cst);
        if (is_closed_.load(std::memory_order_seq_cst)) {
            leave();
            return false;
        }
        return true;
    }
    void leave() noexcept {
        if (inside_.fetch_sub(1, std::memory_order_seq_cst) == 1) {
            wake(empty_);
        }
    }
    [[nodiscard]] bool is_closed() const noexcept { return is_closed_.load(); }
    // Not interruptible: what is inside is a copy of bounded size that waits for nobody.
    void close() noexcept {
        is_closed_.store(true, std::memory_order_seq_cst);
        while (inside_.load(std::memory_order_seq_cst) != 0) {
            empty_.sleepers.fetch_add(1, std::memory_order_seq_cst);
            const std::uint32_t seen = empty_.sequence.load(std::memory_order_seq_cst);
            if (inside_.load(std::memory_order_seq_cst) != 0) {
                futex_sleep(empty_.sequence, seen, kSlice);
            }
            empty_.sleepers.fetch_sub(1, std::memory_order_seq_cst);
        }
    }

  private:
    std::atomic<std::uint32_t> inside_{0};
    std::atomic<bool> is_closed_{false};
    WakeWord empty_;
};

// Work inside the gate for one scope.
class Pass {
  public:
    explicit Pass(Gate& gate) noexcept : gate_(gate), is_in_(gate.enter()) {}
    ~Pass() {
        if (is_in_) {
            gate_.leave();
        }
    }
    Pass(const Pass&) = delete;
    Pass& operator=(const Pass&) = delete;
    [[nodiscard]] explicit operator bool() const noexcept { return is_in_; }

  private:
    Gate& gate_;
    bool is_in_;
};

}  // namespace weightsync::local
