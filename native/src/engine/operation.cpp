#include <weightsync/operation.hpp>

#include <unistd.h>

#include <algorithm>

#include <weightsync/board.hpp>
#include <weightsync/fabric.hpp>

namespace weightsync {

bool EngineContext::is_in_child() const noexcept {
    return ::getpid() != owner_pid;
}

Operation::Operation(EngineContext& context, std::shared_ptr<RemoteInfo> remote,
                     std::vector<Write> rows, std::vector<LeaseState*> pins)
    : context_(context),
      remote_(std::move(remote)),
      rows_(std::move(rows)),
      pins_(std::move(pins)),
      nbytes_(total_bytes(rows_)) {}

Operation::~Operation() {
    if (!is_done() && !context_.is_in_child()) {
        report("an operation to " + remote_->peer + " was dropped before it finished");
        context_.leases.unpin(pins_);
    }
}

const Error* Operation::error() const noexcept {
    return state_.load() == kFailed ? &*error_ : nullptr;
}

void Operation::finish(std::optional<Error> error) noexcept {
    const bool is_failed = error.has_value();
    error_ = std::move(error);
    context_.leases.unpin(pins_);
    pins_.clear();
    for (Counters* counters : {&context_.counters, &remote_->counters}) {
        if (is_failed) {
            counters->add(Count::kFailedOperations);
        } else {
            counters->add(Count::kWrites, rows_.size());
            counters->add(Count::kBytesWritten, nbytes_);
        }
    }
    state_.store(is_failed ? kFailed : kSucceeded, std::memory_order_seq_cst);
    wake(wake_);
    context_.progress.signal();
}

void Operation::wait(const Deadline& deadline) {
    const bool done = context_.fabric->wait(wake_, [this] { return is_done(); }, deadline);
    if (const Error* failure = error()) {
        throw *failure;
    }
    if (done) {
        return;
    }
    std::string detail = std::to_string(rows_.size()) + " writes (" + std::to_string(nbytes_) +
                         " bytes) to " + remote_->peer + " not complete";
    Facts facts{{"peer", remote_->peer},
                {"generation", static_cast<std::int64_t>(remote_->generation)}};
    std::vector<std::int64_t> slots;
    for (const Write& row : rows_) {
        if (row.immediate >= 0) {
            slots.push_back(row.immediate >> remote_->chunk_bits);
        }
    }
    std::ranges::sort(slots);
    slots.erase(std::ranges::unique(slots).begin(), slots.end());
    if (!slots.empty()) {
        detail += " (slots " + ranges_text(slots) + ")";
        facts.emplace_back("slots", slots);
    }
    detail += " after " + seconds_text(deadline.budget_s()) +
              "; the peer is stopped or overloaded, the sources stay in use until it goes on";
    throw Error(Scope::kTimeout, std::move(detail), std::move(facts));
}

}  // namespace weightsync
