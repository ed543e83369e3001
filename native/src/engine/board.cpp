#include <weightsync/board.hpp>

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <new>

#include <weightsync/error.hpp>

namespace weightsync {

namespace {

constexpr int kMaxChunkBits = 20;
// Immediates stay positive as signed 32-bit numbers, so that -1 can mean "none" in tables.
constexpr std::uint64_t kMaxImmediates = std::uint64_t{1} << 31;

}  // namespace

SlotTable::SlotTable(std::span<const std::int32_t> num_chunks, int chunk_bits)
    : chunk_bits_(chunk_bits) {
    if (chunk_bits < 0 || chunk_bits > kMaxChunkBits) {
        throw Error(Scope::kConfig, "chunk_bits=" + std::to_string(chunk_bits) + ": give 0 .. " +
                                        std::to_string(kMaxChunkBits));
    }
    const auto limit = std::uint64_t{1} << chunk_bits;
    if (num_chunks.size() * limit > kMaxImmediates) {
        throw Error(Scope::kConfig, std::to_string(num_chunks.size()) + " slots of 2^" +
                                        std::to_string(chunk_bits) +
                                        " chunks do not fit the 31 bits of an immediate");
    }
    num_chunks_.reserve(num_chunks.size());
    first_word_.reserve(num_chunks.size() + 1);
    std::uint64_t word = 0;
    for (std::size_t slot = 0; slot < num_chunks.size(); ++slot) {
        const std::int32_t chunks = num_chunks[slot];
        if (chunks == kCounter) {
            num_chunks_.push_back(static_cast<std::uint32_t>(chunks));
            first_word_.push_back(word);
            word += kCounterWords;
            continue;
        }
        if (chunks < 1 || static_cast<std::uint64_t>(chunks) > limit) {
            throw Error(Scope::kConfig,
                        "slot " + std::to_string(slot) + " has " + std::to_string(chunks) +
                            " chunks; 1 .. " + std::to_string(limit) +
                            " fit chunk_bits=" + std::to_string(chunk_bits),
                        {{"slot", static_cast<std::int64_t>(slot)}});
        }
        num_chunks_.push_back(static_cast<std::uint32_t>(chunks));
        first_word_.push_back(word);
        word += (static_cast<std::uint64_t>(chunks) + 63) / 64;
    }
    first_word_.push_back(word);
}

Board::Board(std::shared_ptr<const SlotTable> slots, std::byte* storage, int event_fd,
             std::shared_ptr<const void> keep_alive)
    : slots_(std::move(slots)),
      keep_alive_(std::move(keep_alive)),
      header_(reinterpret_cast<Header*>(storage)),
      words_(reinterpret_cast<std::atomic<std::uint64_t>*>(storage + sizeof(Header))),
      event_fd_(event_fd) {}

Board Board::in_heap(std::shared_ptr<const SlotTable> slots, int event_fd) {
    constexpr std::align_val_t kAlign{64};
    const std::uint64_t nbytes = storage_bytes(*slots);
    auto* storage = static_cast<std::byte*>(::operator new(nbytes, kAlign));
    const std::shared_ptr<std::byte> owner(
        storage, [](std::byte* data) { ::operator delete(data, kAlign); });
    new (storage) Header;
    auto* words = reinterpret_cast<std::atomic<std::uint64_t>*>(storage + sizeof(Header));
    for (std::uint64_t i = 0; i < slots->num_words(); ++i) {
        new (words + i) std::atomic<std::uint64_t>(0);
    }
    return Board(std::move(slots), storage, event_fd, owner);
}

void Board::close() noexcept {
    header_->state.store(kClosed, std::memory_order_seq_cst);
    signal();
}

Mark Board::mark(std::uint32_t immediate) noexcept {
    const std::uint32_t slot = immediate >> slots_->chunk_bits();
    const std::uint32_t chunk = immediate & ((std::uint32_t{1} << slots_->chunk_bits()) - 1);
    if (slot >= slots_->num_slots() || chunk >= slots_->num_chunks(slot)) {
        return Mark::kUnknown;
    }
    if (slots_->is_counter(slot)) {
        increment(slot);
        return Mark::kNew;
    }
    const std::uint64_t word = chunk / 64;
    const std::uint64_t bit = std::uint64_t{1} << (chunk % 64);
    // Release: the chunk's bytes are before its bit. Sequentially consistent, because the waiters'
    // protocol (wait.hpp) needs this before the look at `sleepers` in signal().
    const std::uint64_t before =
        words_[slots_->first_word(slot) + word].fetch_or(bit, std::memory_order_seq_cst);
    if ((before & bit) != 0) {
        return Mark::kDuplicate;
    }
    if ((before | bit) == slots_->full_word(slot, word)) {
        signal();
    }
    return Mark::kNew;
}

void Board::increment(std::uint32_t counter) noexcept {
    std::atomic<std::uint64_t>* words = words_ + slots_->first_word(counter);
    // As in mark(): the bytes are before the count, and the count before the look at what is
    // expected. Whoever raises the count to the expected number wakes; expect() does when it comes
    // after.
    const std::uint64_t count = words[0].fetch_add(1, std::memory_order_seq_cst) + 1;
    if (count == words[1].load(std::memory_order_seq_cst)) {
        signal();
    }
}

void Board::expect(std::uint32_t counter, std::uint64_t count) noexcept {
    words_[slots_->first_word(counter) + 1].store(count, std::memory_order_seq_cst);
    signal();
}

Mark Board::look(std::uint32_t immediate) const noexcept {
    const std::uint32_t slot = immediate >> slots_->chunk_bits();
    const std::uint32_t chunk = immediate & ((std::uint32_t{1} << slots_->chunk_bits()) - 1);
    if (slot >= slots_->num_slots() || chunk >= slots_->num_chunks(slot)) {
        return Mark::kUnknown;
    }
    if (slots_->is_counter(slot)) {
        return Mark::kNew;
    }
    // relaxed: an estimate, nothing is read because of it
    const std::uint64_t word =
        words_[slots_->first_word(slot) + chunk / 64].load(std::memory_order_relaxed);
    return (word >> (chunk % 64) & 1) != 0 ? Mark::kDuplicate : Mark::kNew;
}

void Board::account(const Tally& tally) noexcept {
    // relaxed: statistics, they order nothing
    constexpr auto kRelaxed = std::memory_order_relaxed;
    header_->arrivals.fetch_add(tally.arrivals, kRelaxed);
    header_->bytes.fetch_add(tally.bytes, kRelaxed);
    if (tally.duplicates != 0) {
        header_->duplicates.fetch_add(tally.duplicates, kRelaxed);
    }
    if (tally.unknown != 0) {
        header_->protocol_errors.fetch_add(tally.unknown, kRelaxed);
    }
}

void Board::correct(std::uint64_t arrivals_too_many, const Tally& found) noexcept {
    Tally others;
    others.duplicates = found.duplicates;
    others.unknown = found.unknown;
    account(others);
    header_->arrivals.fetch_sub(arrivals_too_many, std::memory_order_relaxed);
}

void Board::signal() noexcept {
    if (wake(header_->wake)) {
        header_->wakeups.fetch_add(1, std::memory_order_relaxed);
    }
    if (event_fd_ >= 0 && header_->armed.load(std::memory_order_seq_cst) != 0) {
        const std::uint64_t one = 1;
        [[maybe_unused]] const auto rc = ::write(event_fd_, &one, sizeof(one));
    }
}

bool Board::is_complete(std::uint32_t slot) const noexcept {
    if (slots_->is_counter(slot)) {
        const std::uint64_t wanted = expected(slot);
        return wanted != 0 && count(slot) >= wanted;
    }
    const std::uint64_t first = slots_->first_word(slot);
    const std::uint64_t count = slots_->first_word(slot + 1) - first;
    for (std::uint64_t word = 0; word < count; ++word) {
        // Bits beyond the slot's chunks are ignored: a peer that sets them gains nothing.
        const std::uint64_t full = slots_->full_word(slot, word);
        if ((words_[first + word].load(std::memory_order_seq_cst) & full) != full) {
            return false;
        }
    }
    return true;
}

std::vector<std::int64_t> Board::missing(std::uint32_t slot) const {
    std::vector<std::int64_t> chunks;
    if (slots_->is_counter(slot)) {
        return chunks;  // what came has no numbers
    }
    const std::uint64_t first = slots_->first_word(slot);
    const std::uint64_t count = slots_->first_word(slot + 1) - first;
    for (std::uint64_t word = 0; word < count; ++word) {
        std::uint64_t rest =
            slots_->full_word(slot, word) & ~words_[first + word].load(std::memory_order_seq_cst);
        while (rest != 0) {
            const auto bit = static_cast<std::uint64_t>(std::countr_zero(rest));
            chunks.push_back(static_cast<std::int64_t>(word * 64 + bit));
            rest &= rest - 1;
        }
    }
    return chunks;
}

void Board::reset(std::uint32_t slot) noexcept {
    if (slots_->is_counter(slot)) {
        std::atomic<std::uint64_t>* words = words_ + slots_->first_word(slot);
        const std::uint64_t wanted = words[1].exchange(0, std::memory_order_seq_cst);
        std::uint64_t came = words[0].load(std::memory_order_seq_cst);
        while (!words[0].compare_exchange_weak(came, came - std::min(came, wanted),
                                               std::memory_order_seq_cst)) {
        }
        return;
    }
    for (std::uint64_t i = slots_->first_word(slot); i < slots_->first_word(slot + 1); ++i) {
        words_[i].store(0, std::memory_order_seq_cst);
    }
}

std::string ranges_text(std::span<const std::int64_t> numbers) {
    constexpr int kMaxRanges = 8;
    std::string text;
    int count = 0;
    for (std::size_t i = 0; i < numbers.size();) {
        std::size_t end = i + 1;
        while (end < numbers.size() && numbers[end] == numbers[end - 1] + 1) {
            ++end;
        }
        if (count++ == kMaxRanges) {
            return text + " ...";
        }
        text += (text.empty() ? "" : ", ") + std::to_string(numbers[i]);
        if (end - i > 1) {
            text += "-" + std::to_string(numbers[end - 1]);
        }
        i = end;
    }
    return text;
}

}  // namespace weightsync
