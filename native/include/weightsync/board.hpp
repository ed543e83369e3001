// Arrival boards: which chunk of which slot has arrived. One bit per chunk, and nothing else is
// kept, so a second arrival changes nothing and a writer that is killed between two instructions
// leaves no half-made count behind: "complete" always means that all bits of a slot are set.
//
// A slot may be a counter instead, for users who send everything once: it counts arrivals, and is
// complete when as many came as are expected. A second arrival of one write counts twice.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <weightsync/wait.hpp>

namespace weightsync {

// In place of a number of chunks: the slot is a counter. Two words: what came, what is expected.
inline constexpr std::int32_t kCounter = INT32_MIN;
inline constexpr std::uint64_t kCounterWords = 2;

// Chunks of each slot, and where their bits are. Immutable and private to a process: a peer that
// scribbles over shared memory can neither move nor grow a bit range.
class SlotTable {
  public:
    // Throws kConfig unless every slot has 1 .. 2^chunk_bits chunks or is a counter, and the
    // immediates fit 31 bits.
    SlotTable(std::span<const std::int32_t> num_chunks, int chunk_bits);

    [[nodiscard]] std::uint32_t num_slots() const noexcept {
        return static_cast<std::uint32_t>(num_chunks_.size());
    }
    [[nodiscard]] int chunk_bits() const noexcept { return chunk_bits_; }
    // Of a counter: kCounter as it is stored, more than any chunk number.
    [[nodiscard]] std::uint32_t num_chunks(std::uint32_t slot) const { return num_chunks_[slot]; }
    [[nodiscard]] bool is_counter(std::uint32_t slot) const noexcept {
        return num_chunks_[slot] == static_cast<std::uint32_t>(kCounter);
    }
    [[nodiscard]] std::uint64_t first_word(std::uint32_t slot) const { return first_word_[slot]; }
    [[nodiscard]] std::uint64_t num_words() const noexcept { return first_word_.back(); }
    // The bits of word `word` (0 .. words of the slot - 1) when all of its chunks have arrived.
    [[nodiscard]] std::uint64_t full_word(std::uint32_t slot, std::uint64_t word) const noexcept {
        const std::uint64_t rest = num_chunks_[slot] - word * 64;
        return rest >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << rest) - 1;
    }

  private:
    std::vector<std::uint32_t> num_chunks_;
    std::vector<std::uint64_t> first_word_;  // num_slots + 1: bit ranges start at whole words
    int chunk_bits_;
};

enum class Mark : std::uint8_t { kNew, kDuplicate, kUnknown };

// Sums of one batch, added to a board's counters at its end: no shared counter per write.
struct Tally {
    std::uint64_t arrivals = 0;
    std::uint64_t duplicates = 0;
    std::uint64_t unknown = 0;
    std::uint64_t bytes = 0;

    void add(Mark mark) noexcept {
        arrivals += mark == Mark::kNew ? 1U : 0U;
        duplicates += mark == Mark::kDuplicate ? 1U : 0U;
        unknown += mark == Mark::kUnknown ? 1U : 0U;
    }
};

// View of a board in private or shared memory. Marking is lock-free and safe from many threads of
// many processes.
class Board {
  public:
    enum State : std::uint32_t { kOpen = 1, kClosed = 2 };

    struct Header {
        std::atomic<std::uint32_t> state{kOpen};
        // Non-zero while an event loop wants the eventfd written when something fills up.
        std::atomic<std::uint32_t> armed{0};
        WakeWord wake;
        alignas(64) std::atomic<std::uint64_t> arrivals{0};
        std::atomic<std::uint64_t> duplicates{0};
        std::atomic<std::uint64_t> protocol_errors{0};
        std::atomic<std::uint64_t> bytes{0};
        std::atomic<std::uint64_t> wakeups{0};
    };
    static_assert(std::atomic<std::uint64_t>::is_always_lock_free);

    [[nodiscard]] static std::uint64_t storage_bytes(const SlotTable& slots) noexcept {
        return sizeof(Header) + slots.num_words() * sizeof(std::uint64_t);
    }

    // `storage` is 64-byte aligned, zeroed, at least storage_bytes long and outlives the board.
    // `keep_alive` may own it. `event_fd` (borrowed, or -1) is written while armed.
    Board(std::shared_ptr<const SlotTable> slots, std::byte* storage, int event_fd,
          std::shared_ptr<const void> keep_alive = nullptr);
    // A board in private memory.
    [[nodiscard]] static Board in_heap(std::shared_ptr<const SlotTable> slots, int event_fd);
    // Make a zeroed header a live one; by the owner, before anybody else sees the board.
    void initialise() noexcept { header_->state.store(kOpen); }

    [[nodiscard]] const SlotTable& slots() const noexcept { return *slots_; }
    [[nodiscard]] Header& header() const noexcept { return *header_; }
    [[nodiscard]] bool is_open() const noexcept { return header_->state.load() == kOpen; }
    void close() noexcept;

    // Set the bit of an immediate; bytes written before are visible to whoever sees the bit.
    // Wakes waiters when a word of bits becomes full.
    Mark mark(std::uint32_t immediate) noexcept;
    // What mark() would say now.
    [[nodiscard]] Mark look(std::uint32_t immediate) const noexcept;
    void account(const Tally& tally) noexcept;
    // Some arrivals that were accounted for before they were marked were none: take them off, and
    // count the duplicates and unknown ones of `found` instead.
    void correct(std::uint64_t arrivals_too_many, const Tally& found) noexcept;
    // Wake every waiter, and the event loop when armed.
    void signal() noexcept;

    [[nodiscard]] bool is_complete(std::uint32_t slot) const noexcept;
    [[nodiscard]] std::vector<std::int64_t> missing(std::uint32_t slot) const;
    // Forget the arrivals of a slot; nobody may be writing it. Of a counter: take away what was
    // expected and expect nothing; what came on top stays, and it may be written meanwhile.
    void reset(std::uint32_t slot) noexcept;

    // What a counter must reach to be complete; 0: nothing is expected, and it never is. Wakes
    // waiters, as it may be complete by that.
    void expect(std::uint32_t counter, std::uint64_t count) noexcept;
    [[nodiscard]] std::uint64_t count(std::uint32_t counter) const noexcept {
        return words_[slots_->first_word(counter)].load(std::memory_order_seq_cst);
    }
    [[nodiscard]] std::uint64_t expected(std::uint32_t counter) const noexcept {
        return words_[slots_->first_word(counter) + 1].load(std::memory_order_seq_cst);
    }

  private:
    void increment(std::uint32_t counter) noexcept;

    std::shared_ptr<const SlotTable> slots_;
    std::shared_ptr<const void> keep_alive_;
    Header* header_;
    std::atomic<std::uint64_t>* words_;
    int event_fd_;
};

// "0-4, 9 and 12" style text of sorted numbers, cut after a few ranges.
[[nodiscard]] std::string ranges_text(std::span<const std::int64_t> numbers);

}  // namespace weightsync
