#include <algorithm>
#include <utility>

#include <weightsync/codec.hpp>
#include <weightsync/engine.hpp>

namespace weightsync {

namespace {

std::uint64_t& entry(std::array<std::uint64_t, kCountNames.size()>& counts, Count which) {
    return counts[static_cast<std::size_t>(which)];
}

}  // namespace

Target::Target(EngineContext& context, std::shared_ptr<TargetPort> port, std::uint64_t generation,
               std::vector<RangeRequest> ranges)
    : context_(context),
      port_(std::move(port)),
      slots_(std::make_shared<SlotTable>(port_->board().slots())),
      generation_(generation),
      ranges_(std::move(ranges)),
      is_reported_(std::make_unique<std::atomic<bool>[]>(slots_->num_slots())) {
    for (const RangeRequest& range : ranges_) {
        range.lease->exports.fetch_add(1);
    }
    arm(context_.progress.armed.load() != 0);
}

Target::~Target() {
    close();
    if (context_.is_in_child()) {
        keep_for_ever(std::move(port_));
        return;
    }
    // A lease may have been dropped while this target exported it.
    [[maybe_unused]] const auto idle = context_.leases.collect();
}

void Target::check_open(const char* what) const {
    switch (state_.load()) {
        case kOpen:
            return;
        case kFenced:
            throw Error(Scope::kFenced,
                        std::string(what) + ": the target of generation " +
                            std::to_string(generation_) +
                            " was fenced and what arrived is void; export a new one",
                        {{"generation", static_cast<std::int64_t>(generation_)}});
        case kClosed:
            throw Error(Scope::kConfig, std::string(what) + ": the target is closed");
    }
}

void Target::check_slot(std::int64_t slot) const {
    if (slot < 0 || slot >= static_cast<std::int64_t>(slots_->num_slots())) {
        throw Error(Scope::kConfig, "slot " + std::to_string(slot) + " does not exist; there are " +
                                        std::to_string(slots_->num_slots()));
    }
}

void Target::check_counter(std::int64_t slot) const {
    check_slot(slot);
    if (!slots_->is_counter(static_cast<std::uint32_t>(slot))) {
        throw Error(
            Scope::kConfig,
            "slot " + std::to_string(slot) + " has chunks; only a slot exported as COUNTER counts",
            {{"slot", slot}});
    }
}

std::vector<std::byte> Target::descriptor() const {
    check_open("descriptor");
    ByteWriter writer;
    writer.put(kDescriptorMagic).put(kDescriptorVersion).put_text(context_.fabric->name());
    return writer.put_bytes(port_->descriptor()).take();
}

void Target::wait(std::span<const std::int32_t> slots, const Deadline& deadline) {
    for (const std::int32_t slot : slots) {
        check_slot(slot);
    }
    check_open("wait");
    Board& board = port_->board();
    std::size_t at = 0;
    const auto ready = [&] {
        while (at < slots.size() && board.is_complete(static_cast<std::uint32_t>(slots[at]))) {
            ++at;
        }
        return at == slots.size() || state_.load() != kOpen;
    };
    const bool is_ready = context_.fabric->wait(board.header().wake, ready, deadline);
    check_open("wait");
    if (!is_ready) {
        throw_timeout(slots.subspan(at), deadline.budget_s());
    }
}

void Target::throw_timeout(std::span<const std::int32_t> slots, double seconds) const {
    constexpr std::size_t kMaxNamed = 4;
    std::vector<std::int64_t> incomplete;
    for (const std::int32_t slot : slots) {
        if (!has_arrived(slot)) {
            incomplete.push_back(slot);
        }
    }
    std::string detail = std::to_string(incomplete.size()) + " slots incomplete after " +
                         seconds_text(seconds) + ":";
    Facts facts{{"generation", static_cast<std::int64_t>(generation_)}};
    for (std::size_t i = 0; i < std::min(incomplete.size(), kMaxNamed); ++i) {
        const auto slot = static_cast<std::uint32_t>(incomplete[i]);
        if (slots_->is_counter(slot)) {
            detail += (i == 0 ? " counter " : "; counter ") + std::to_string(slot) + " stands at " +
                      std::to_string(port_->board().count(slot)) + " of " +
                      std::to_string(port_->board().expected(slot));
            if (i == 0) {
                facts.emplace_back("slot", std::int64_t{slot});
            }
            continue;
        }
        const std::vector<std::int64_t> chunks = port_->board().missing(slot);
        detail += (i == 0 ? " slot " : "; slot ") + std::to_string(slot) + " lacks chunks " +
                  ranges_text(chunks) + " (" + std::to_string(chunks.size()) + " of " +
                  std::to_string(slots_->num_chunks(slot)) + ")";
        if (i == 0) {
            facts.emplace_back("slot", std::int64_t{slot});
            facts.emplace_back("chunks", chunks);
        }
    }
    if (incomplete.size() > kMaxNamed) {
        detail += "; ...";
    }
    facts.emplace_back("slots", std::move(incomplete));
    throw Error(Scope::kTimeout, std::move(detail), std::move(facts));
}

bool Target::is_complete(std::span<const std::int32_t> slots) const {
    for (const std::int32_t slot : slots) {
        check_slot(slot);
    }
    check_open("is_complete");
    return std::ranges::all_of(slots, [&](std::int32_t slot) {
        return port_->board().is_complete(static_cast<std::uint32_t>(slot));
    });
}

std::vector<std::int64_t> Target::poll(const Deadline& deadline) {
    check_open("poll");
    Board& board = port_->board();
    const auto is_fresh = [&](std::uint32_t slot) {
        return !is_reported_[slot].load() && board.is_complete(slot);
    };
    const auto ready = [&] {
        if (state_.load() != kOpen) {
            return true;
        }
        for (std::uint32_t slot = 0; slot < slots_->num_slots(); ++slot) {
            if (is_fresh(slot)) {
                return true;
            }
        }
        return false;
    };
    [[maybe_unused]] const bool is_ready =
        context_.fabric->wait(board.header().wake, ready, deadline);
    check_open("poll");
    std::vector<std::int64_t> fresh;
    for (std::uint32_t slot = 0; slot < slots_->num_slots(); ++slot) {
        // Claimed, so that two threads that poll share the slots between them.
        if (is_fresh(slot) && !is_reported_[slot].exchange(true)) {
            fresh.push_back(slot);
        }
    }
    return fresh;
}

std::vector<std::int64_t> Target::missing(std::int32_t slot) const {
    check_slot(slot);
    check_open("missing");
    if (slots_->is_counter(static_cast<std::uint32_t>(slot))) {
        throw Error(Scope::kConfig,
                    "slot " + std::to_string(slot) + " is a counter and knows no chunks; see count",
                    {{"slot", std::int64_t{slot}}});
    }
    return port_->board().missing(static_cast<std::uint32_t>(slot));
}

void Target::reset(std::span<const std::int32_t> slots) {
    for (const std::int32_t slot : slots) {
        check_slot(slot);
    }
    const std::lock_guard lock(mutex_);
    check_open("reset");
    for (const std::int32_t slot : slots) {
        port_->board().reset(static_cast<std::uint32_t>(slot));
        is_reported_[static_cast<std::size_t>(slot)].store(false);
    }
}

void Target::expect_count(std::int64_t counter, std::int64_t count) {
    check_counter(counter);
    if (count < 1) {
        throw Error(Scope::kConfig,
                    "cannot expect " + std::to_string(count) + " arrivals; give 1 or more",
                    {{"slot", counter}});
    }
    const std::lock_guard lock(mutex_);
    check_open("expect_count");
    is_reported_[static_cast<std::size_t>(counter)].store(false);
    port_->board().expect(static_cast<std::uint32_t>(counter), static_cast<std::uint64_t>(count));
}

std::uint64_t Target::count(std::int64_t counter) const {
    check_counter(counter);
    check_open("count");
    return port_->board().count(static_cast<std::uint32_t>(counter));
}

bool Target::wait_for(const std::function<bool()>& ready, const Deadline& deadline) {
    check_open("wait");
    const auto is_over = [&] { return ready() || state_.load() != kOpen; };
    const bool is_ready = context_.fabric->wait(port_->board().header().wake, is_over, deadline);
    check_open("wait");
    return is_ready;  // not asked again: another thread may have taken what was there
}

void Target::flush() {
    check_open("flush");
    port_->flush();
}

void Target::fence(bool discard) {
    if (context_.is_in_child()) {
        throw Error(Scope::kConfig, "fence: this target was opened before the process forked");
    }
    const std::lock_guard lock(mutex_);
    if (state_.load() == kFenced) {
        return;
    }
    check_open("fence");
    port_->fence(discard);
    final_counts_ = counters();
    state_.store(kFenced);
    port_->board().close();  // waiters see the new state
    context_.counters.add(Count::kFences);
    let_go();
}

void Target::close() noexcept {
    if (context_.is_in_child()) {
        state_.store(kClosed);
        return;
    }
    const std::lock_guard lock(mutex_);
    if (state_.load() == kClosed) {
        return;
    }
    const bool was_open = state_.load() == kOpen;
    if (was_open) {
        final_counts_ = counters();
    }
    state_.store(kClosed);
    port_->board().close();
    port_->close();
    if (was_open) {
        let_go();
    }
}

void Target::let_go() noexcept {
    for (const RangeRequest& range : ranges_) {
        range.lease->exports.fetch_sub(1);
        if (range.block) {
            range.block->give_back();
        }
    }
    ranges_.clear();
    for (std::size_t i = 0; i < final_counts_.size(); ++i) {
        context_.counters.add(static_cast<Count>(i), final_counts_[i]);
    }
}

void Target::arm(bool on) noexcept {
    port_->board().header().armed.store(on ? 1 : 0);
}

std::array<std::uint64_t, kCountNames.size()> Target::counters() const noexcept {
    if (state_.load() != kOpen) {
        return final_counts_;
    }
    std::array<std::uint64_t, kCountNames.size()> counts{};
    const Board::Header& header = port_->board().header();
    entry(counts, Count::kArrivals) = header.arrivals.load();
    entry(counts, Count::kBytesArrived) = header.bytes.load();
    entry(counts, Count::kDuplicates) = header.duplicates.load();
    entry(counts, Count::kProtocolErrors) = header.protocol_errors.load();
    entry(counts, Count::kWakeups) = header.wakeups.load();
    return counts;
}

}  // namespace weightsync
