#include <weightsync/scatter.hpp>

#include <algorithm>
#include <string>
#include <utility>

namespace weightsync {

namespace {

// The rows for one peer, checked and pinned but not posted.
struct Batch {
    std::vector<Write> rows;
    std::vector<std::int64_t> numbers;  // of the rows in the caller's table
    std::vector<LeaseState*> pins;
};

// Errors of a batch count its own rows; the caller knows the table only.
[[noreturn]] void rethrow_by_table(const Error& error, const Batch& batch) {
    Facts facts = error.facts();
    std::string detail = error.detail();
    for (auto& [name, fact] : facts) {
        if (const auto* row = std::get_if<std::int64_t>(&fact); name == "row" && row != nullptr) {
            const std::int64_t number = batch.numbers[static_cast<std::size_t>(*row)];
            detail = "row " + std::to_string(number) + " of the scatter: " + detail;
            fact = number;
        }
    }
    throw Error(error.scope(), std::move(detail), std::move(facts));
}

}  // namespace

std::shared_ptr<ScatterOperation> Engine::scatter(std::span<const std::shared_ptr<Remote>> remotes,
                                                  std::span<const Write> rows,
                                                  std::span<const std::int32_t> peers) {
    begin_call();
    if (peers.size() != rows.size()) {
        throw Error(Scope::kConfig, std::to_string(rows.size()) + " writes and " +
                                        std::to_string(peers.size()) +
                                        " peers: give one peer for each write");
    }
    for (const auto& remote : remotes) {
        if (!remote || &remote->context_ != &context_) {
            throw Error(Scope::kConfig, "a remote of the scatter is of another engine");
        }
    }
    std::vector<std::size_t> counts(remotes.size(), 0);
    for (std::size_t i = 0; i < peers.size(); ++i) {
        if (peers[i] < 0 || static_cast<std::size_t>(peers[i]) >= remotes.size()) {
            throw Error(Scope::kConfig,
                        "row " + std::to_string(i) + " of the scatter goes to peer " +
                            std::to_string(peers[i]) + "; there are " +
                            std::to_string(remotes.size()),
                        {{"row", static_cast<std::int64_t>(i)}});
        }
        ++counts[static_cast<std::size_t>(peers[i])];
    }
    std::vector<Batch> batches(remotes.size());
    for (std::size_t i = 0; i < batches.size(); ++i) {
        batches[i].rows.reserve(counts[i]);
        batches[i].numbers.reserve(counts[i]);
    }
    for (std::size_t i = 0; i < rows.size(); ++i) {
        Batch& batch = batches[static_cast<std::size_t>(peers[i])];
        batch.rows.push_back(rows[i]);
        batch.numbers.push_back(static_cast<std::int64_t>(i));
    }
    try {
        for (std::size_t i = 0; i < batches.size(); ++i) {
            if (!batches[i].rows.empty()) {
                try {
                    batches[i].pins = remotes[i]->prepare(batches[i].rows);
                } catch (const Error& error) {
                    rethrow_by_table(error, batches[i]);
                }
            }
        }
    } catch (...) {
        for (const Batch& batch : batches) {
            context_.leases.unpin(batch.pins);
        }
        throw;
    }
    std::vector<ScatterOperation::Part> parts;
    parts.reserve(batches.size());
    for (std::size_t i = 0; i < batches.size(); ++i) {
        if (!batches[i].rows.empty()) {
            parts.push_back(
                {static_cast<std::int64_t>(i), remotes[i],
                 remotes[i]->start(std::move(batches[i].rows), std::move(batches[i].pins))});
        }
    }
    return std::make_shared<ScatterOperation>(std::move(parts));
}

bool ScatterOperation::is_done() const noexcept {
    return std::ranges::all_of(parts_, [](const Part& part) { return part.operation->is_done(); });
}

std::optional<Error> ScatterOperation::error() const {
    if (!is_done()) {
        return std::nullopt;
    }
    const Error* first = nullptr;
    std::string detail;
    std::vector<std::int64_t> failed;
    for (const Part& part : parts_) {
        if (const Error* error = part.operation->error()) {
            first = first == nullptr ? error : first;
            detail += (failed.empty() ? "" : "; ") + part.operation->remote().peer + ": " +
                      error->detail();
            failed.push_back(part.index);
        }
    }
    if (first == nullptr) {
        return std::nullopt;
    }
    Facts facts = first->facts();
    detail = std::to_string(failed.size()) + " of " + std::to_string(parts_.size()) +
             " peers failed: " + detail;
    facts.emplace_back("remotes", std::move(failed));
    return Error(first->scope(), std::move(detail), std::move(facts));
}

void ScatterOperation::wait(const Deadline& deadline) const {
    for (const Part& part : parts_) {
        try {
            part.operation->wait(deadline);
        } catch (const Error&) {
            if (!part.operation->is_done()) {
                break;  // the deadline has passed for all of them
            }
        }
    }
    if (is_done()) {
        if (std::optional<Error> failure = error()) {
            throw std::move(*failure);
        }
        return;
    }
    std::string names;
    std::vector<std::int64_t> pending;
    Facts facts;
    for (const Part& part : parts_) {
        if (!part.operation->is_done()) {
            const std::string& peer = part.operation->remote().peer;
            if (pending.empty()) {
                facts.emplace_back("peer", peer);
            }
            names += (pending.empty() ? "" : ", ") + peer;
            pending.push_back(part.index);
        }
    }
    const std::string count = std::to_string(pending.size());
    facts.emplace_back("remotes", std::move(pending));
    throw Error(Scope::kTimeout,
                "writes to " + count + " of " + std::to_string(parts_.size()) +
                    " peers not complete after " + seconds_text(deadline.budget_s()) + ": " +
                    names + "; the sources stay in use until they go on",
                std::move(facts));
}

std::uint64_t ScatterOperation::nbytes() const noexcept {
    std::uint64_t total = 0;
    for (const Part& part : parts_) {
        total += part.operation->nbytes();
    }
    return total;
}

std::uint64_t ScatterOperation::num_writes() const noexcept {
    std::uint64_t total = 0;
    for (const Part& part : parts_) {
        total += part.operation->rows().size();
    }
    return total;
}

}  // namespace weightsync
