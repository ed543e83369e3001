// Copying by a few worker threads.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include <weightsync/ranges.hpp>

namespace weightsync {

// Shorter runs stay in the caches, where whoever reads them next finds them. Measured on Zen 5:
// from 64 KiB on, streaming stores copy at 1.3 times the rate of memcpy.
inline constexpr std::uint64_t kStreamBytes = std::uint64_t{64} << 10;

// memcpy that goes around the caches for long runs: destination lines are not read first, so three
// streams of memory traffic become two. All stores are globally visible when it returns.
void copy_bytes(std::byte* destination, const std::byte* source, std::uint64_t nbytes) noexcept;

// Order stores that went around the caches before the bits that announce them.
void store_fence() noexcept;

// Work in numbered units; run() is called once per unit from any worker, finish() once at the end.
class Job {
  public:
    explicit Job(std::size_t num_units) : num_units_(num_units), left_(num_units) {}
    virtual ~Job() = default;
    Job(const Job&) = delete;
    Job& operator=(const Job&) = delete;

    virtual void run(std::size_t unit) noexcept = 0;
    virtual void finish() noexcept = 0;
    [[nodiscard]] std::size_t num_units() const noexcept { return num_units_; }

    // Claim and run units until none is left; the thread that completes the last one finishes.
    void work() noexcept;

  private:
    std::size_t num_units_;
    std::atomic<std::size_t> next_{0};
    std::atomic<std::size_t> left_;
};

// First in, first out. Threads start with the first job and sleep when there is none.
class CopyPool {
  public:
    explicit CopyPool(int num_threads) : num_threads_(num_threads) {}
    // Runs what is queued, then joins.
    ~CopyPool() { stop(); }
    CopyPool(const CopyPool&) = delete;
    CopyPool& operator=(const CopyPool&) = delete;

    [[nodiscard]] int num_threads() const noexcept { return num_threads_; }
    void submit(std::shared_ptr<Job> job);
    void stop() noexcept;

  private:
    void loop();

    int num_threads_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<std::shared_ptr<Job>> queue_;
    bool stopping_ = false;
    std::vector<std::thread> threads_;
};

// A thread of ours: named, and with all signals blocked so that handlers of the host language run
// on its own threads.
[[nodiscard]] std::thread start_thread(const char* name, void (*body)(void*), void* argument);

// Lets go of a thread that does not come back from a library: it may spin there until the process
// ends, so from now on it gets only what no other thread of the host wants.
void abandon(std::thread thread) noexcept;

// A batch cut into units of about `unit_bytes`: neighbouring small rows together, a long row into
// pieces.
struct CopyUnit {
    std::uint32_t row_begin;
    std::uint32_t row_end;
    std::uint64_t offset;  // inside row_begin, when it is a piece
    std::uint64_t nbytes;  // of the piece; 0 means whole rows
};
struct CopyUnits {
    std::vector<CopyUnit> units;
    // Pieces still to come of each row that was split, by row; empty when none was.
    std::unique_ptr<std::atomic<std::uint32_t>[]> pieces_left;
    // True when the piece was the last of its row, or the row was not split.
    [[nodiscard]] bool take_piece(std::uint32_t row) const noexcept {
        return pieces_left[row].fetch_sub(1, std::memory_order_acq_rel) == 1;
    }
};
[[nodiscard]] CopyUnits cut_units(std::span<const Write> rows, std::uint64_t unit_bytes,
                                  std::uint32_t max_rows);

}  // namespace weightsync
