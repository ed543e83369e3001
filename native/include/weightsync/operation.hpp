// One posted batch of writes.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <weightsync/counters.hpp>
#include <weightsync/error.hpp>
#include <weightsync/lease.hpp>
#include <weightsync/ranges.hpp>
#include <weightsync/wait.hpp>

namespace weightsync {

class Fabric;

// Tells an event loop that something finished; a system call only while a loop has armed it.
struct ProgressSignal {
    EventFd event;
    std::atomic<std::uint32_t> armed{0};
    void signal() const noexcept {
        if (armed.load(std::memory_order_seq_cst) != 0) {
            event.signal();
        }
    }
};

// What an engine, its fabric, remotes and operations share. Outlives all of them.
struct EngineContext {
    std::string name;
    LeaseTable leases;
    Counters counters;
    ProgressSignal progress;
    Fabric* fabric = nullptr;
    int owner_pid = 0;
    // A forked child has copies of our objects but none of our threads, and shares our sockets:
    // nothing may be closed, joined or sent from there.
    [[nodiscard]] bool is_in_child() const noexcept;
};

// What an operation must know of where it goes, for messages and counters.
struct RemoteInfo {
    std::string peer;
    std::uint64_t generation = 0;
    int chunk_bits = 0;
    RangeTable ranges;
    Counters counters;
};

class Operation : Counted<Kind::kOperation> {
  public:
    // Takes over the pins of `pins`.
    Operation(EngineContext& context, std::shared_ptr<RemoteInfo> remote, std::vector<Write> rows,
              std::vector<LeaseState*> pins);
    ~Operation();

    [[nodiscard]] std::span<const Write> rows() const noexcept { return rows_; }
    // Leases of the sources; until it is finished.
    [[nodiscard]] std::span<LeaseState* const> pins() const noexcept { return pins_; }
    [[nodiscard]] const RemoteInfo& remote() const noexcept { return *remote_; }
    [[nodiscard]] std::uint64_t nbytes() const noexcept { return nbytes_; }

    // Done: the sources may be changed again, and nothing of this batch will be written any more
    // (an error says otherwise where a fabric cannot take a request back).
    [[nodiscard]] bool is_done() const noexcept { return state_.load() != kPending; }
    // Null while pending and after success.
    [[nodiscard]] const Error* error() const noexcept;
    // Returns after success; throws the operation's error, or kTimeout while it goes on.
    void wait(const Deadline& deadline);

    // By the fabric, exactly once, when the memory is quiescent.
    void finish(std::optional<Error> error) noexcept;

  private:
    enum State : std::uint32_t { kPending, kSucceeded, kFailed };

    EngineContext& context_;
    std::shared_ptr<RemoteInfo> remote_;
    std::vector<Write> rows_;
    std::vector<LeaseState*> pins_;
    std::uint64_t nbytes_;
    std::optional<Error> error_;
    std::atomic<std::uint32_t> state_{kPending};
    WakeWord wake_;
};

}  // namespace weightsync
