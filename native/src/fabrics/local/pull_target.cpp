// The sink pulls: private memory is written by its own threads only, so a fence is a closed gate.
#include <sys/epoll.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <limits>

#include "target.hpp"

namespace weightsync::local {

namespace {

// Large enough to hide the cost of a call, small enough that a fence waits a millisecond.
constexpr std::uint64_t kPullUnitBytes = std::uint64_t{4} << 20;
// Vectors of one process_vm_readv; the kernel takes at most 1024.
constexpr std::uint32_t kMaxVectors = 512;

struct Failure {
    Scope scope = Scope::kInternal;
    int error = 0;
    std::uint32_t row = 0;
};

Failure failure_of(int error, std::uint32_t row) noexcept {
    // EFAULT: the source unmapped what it promised to hold. EPERM: ptrace limits.
    return {error == ESRCH ? Scope::kPeer : Scope::kMemory, error, row};
}

std::byte* end_of(const iovec& part) noexcept {
    return static_cast<std::byte*>(part.iov_base) + part.iov_len;
}

class PullTarget;

class PullJob final : public Job {
  public:
    PullJob(std::shared_ptr<PullTarget> target, std::shared_ptr<Session> session,
            ChannelEntry& entry, std::vector<Write> rows, CopyUnits units)
        : Job(units.units.size()),
          target_(std::move(target)),
          session_(std::move(session)),
          entry_(entry),
          rows_(std::move(rows)),
          units_(std::move(units)) {}

    void run(std::size_t unit) noexcept override;
    void finish() noexcept override;

  private:
    void read_rows(const CopyUnit& unit, Tally& tally) noexcept;
    void fail(const Failure& failure) noexcept;

    std::shared_ptr<PullTarget> target_;
    std::shared_ptr<Session> session_;  // holds the channel that entry_ lies in
    ChannelEntry& entry_;
    std::vector<Write> rows_;  // destination: an address of this process
    CopyUnits units_;
    std::atomic<bool> has_failed_{false};
    Failure failure_;  // by the first who sets has_failed_
};

void complete(const Session& session, ChannelEntry& entry, const Failure* failure) noexcept {
    entry.scope = failure == nullptr ? -1 : static_cast<std::int32_t>(failure->scope);
    entry.error = failure == nullptr ? 0 : failure->error;
    entry.row = failure == nullptr ? 0 : failure->row;
    entry.state.store(ChannelEntry::kDone, std::memory_order_release);
    session.source_event.signal();
}

class PullTarget final : public LocalTarget {
  public:
    PullTarget(EngineContext& context, Reactor& reactor, CopyPool& pool, Descriptor descriptor,
               TargetSpec spec)
        : LocalTarget(context, reactor, std::move(descriptor), std::move(spec)),
          pool_(pool),
          control_(write_control(spec_, Mode::kPull, {})),
          board_(Board::in_heap(spec_.slots, context_.progress.event.get())) {}

    ~PullTarget() override { reactor_.unwatch(doorbell_watch_); }

    void start() {
        doorbell_watch_ = reactor_.watch(doorbell_.get(), EPOLLIN, [weak = weak_from_this()] {
            if (const auto self = std::static_pointer_cast<PullTarget>(weak.lock())) {
                self->on_doorbell();
            }
        });
    }

    [[nodiscard]] Board& board() noexcept override { return board_; }
    [[nodiscard]] Gate& gate() noexcept { return gate_; }

    void fence(bool /*discard*/) override { close(); }

    void close() noexcept override {
        gate_.close();
        {
            const std::lock_guard lock(mutex_);
            for (auto& [id, session] : sessions_) {
                session->channel().is_closed.store(1, std::memory_order_seq_cst);
                session->source_event.signal();
            }
        }
        drop_sessions();
    }

  private:
    std::vector<int> welcome(Session& session, const Request& request,
                             std::vector<UniqueFd>& keep) override {
        probe(session, request);
        keep.push_back(make_memfd("weightsync-channel", file_bytes(sizeof(Channel))));
        session.channel_mapping =
            std::make_unique<Mapping>(keep.back().get(), file_bytes(sizeof(Channel)));
        session.channel().magic = kMagic;
        return {control_.fd.get(), doorbell_.get(), keep.back().get()};
    }

    static void probe(const Session& session, const Request& request) {
        std::uint64_t value = 0;
        const iovec here{&value, sizeof(value)};
        const iovec there{reinterpret_cast<void*>(request.probe_address), sizeof(value)};
        const ssize_t got = ::process_vm_readv(session.peer.pid, &here, 1, &there, 1, 0);
        if (got < 0) {
            throw os_error(Scope::kMemory, "process_vm_readv", errno,
                           "the sink may not read the source's memory: run both as one user, in "
                           "one pid namespace, with ptrace allowed (seccomp, CAP_SYS_PTRACE, "
                           "/proc/sys/kernel/yama/ptrace_scope)");
        }
        if (value != request.probe_value) {
            throw Error(Scope::kMemory,
                        "the sink reads the memory of another process than the source's; both "
                        "must run in one pid namespace");
        }
    }

    void on_doorbell() {
        doorbell_.drain();
        std::vector<std::shared_ptr<Session>> sessions;
        {
            const std::lock_guard lock(mutex_);
            for (const auto& [id, session] : sessions_) {
                sessions.push_back(session);
            }
        }
        for (const auto& session : sessions) {
            for (;;) {
                ChannelEntry& entry =
                    session->channel().entries[session->next_entry % Channel::kCapacity];
                if (entry.state.load(std::memory_order_acquire) != ChannelEntry::kPosted) {
                    break;
                }
                ++session->next_entry;
                take(session, entry);
            }
        }
    }

    // Starts one batch. Everything the source says is checked on a private copy.
    void take(const std::shared_ptr<Session>& session, ChannelEntry& entry) {
        const std::uint64_t table_address = entry.table_address;
        const std::uint64_t num_rows = entry.num_rows;
        entry.state.store(ChannelEntry::kTaken, std::memory_order_relaxed);
        const auto refuse = [&](const Failure& failure) {
            board_.account({.unknown = failure.scope == Scope::kConfig ? 1U : 0U});
            complete(*session, entry, &failure);
        };
        if (num_rows > kMaxRows) {
            refuse({Scope::kConfig, 0, 0});
            return;
        }
        std::vector<Write> rows(num_rows);
        const iovec here{rows.data(), rows.size() * sizeof(Write)};
        const iovec there{reinterpret_cast<void*>(table_address), rows.size() * sizeof(Write)};
        const ssize_t got = ::process_vm_readv(session->peer.pid, &here, 1, &there, 1, 0);
        if (got != static_cast<ssize_t>(here.iov_len)) {
            refuse(failure_of(got < 0 ? errno : EFAULT, 0));
            return;
        }
        if (session->is_void()) {  // the table may have been something else already
            refuse({Scope::kPeer, ESRCH, 0});
            return;
        }
        std::size_t hint = 0;
        for (std::size_t i = 0; i < rows.size(); ++i) {
            Write& row = rows[i];
            const Range* range = spec_.ranges.find(row.destination, row.nbytes, hint);
            if (range == nullptr || row.immediate < kNoImmediate ||
                row.immediate > std::numeric_limits<std::int32_t>::max()) {
                refuse({Scope::kConfig, 0, static_cast<std::uint32_t>(i)});
                return;
            }
            row.destination = range->base + (row.destination - range->arena_offset);
        }
        CopyUnits units = cut_units(rows, kPullUnitBytes, kMaxVectors);
        const auto self = std::static_pointer_cast<PullTarget>(shared_from_this());
        const auto job =
            std::make_shared<PullJob>(self, session, entry, std::move(rows), std::move(units));
        try {
            pool_.submit(job);
        } catch (const Error&) {  // the engine is closing
            refuse({Scope::kFenced, 0, 0});
        }
    }

    CopyPool& pool_;
    ControlMemory control_;
    Board board_;
    EventFd doorbell_;
    std::uint64_t doorbell_watch_ = 0;
    Gate gate_;
};

void PullJob::run(std::size_t unit) noexcept {
    const Pass pass(target_->gate());
    if (!pass) {
        fail({Scope::kFenced, 0, 0});
        return;
    }
    if (has_failed_.load()) {
        return;
    }
    Tally tally;
    read_rows(units_.units[unit], tally);
    target_->board().account(tally);
}

void PullJob::read_rows(const CopyUnit& unit, Tally& tally) noexcept {
    std::array<iovec, kMaxVectors> here;
    std::array<iovec, kMaxVectors> there;
    std::array<std::uint32_t, kMaxVectors> row_of;
    std::size_t count = 0;
    for (std::uint32_t i = unit.row_begin; i < unit.row_end; ++i) {
        const Write& row = rows_[i];
        const std::uint64_t nbytes = unit.nbytes != 0 ? unit.nbytes : row.nbytes;
        auto* to = reinterpret_cast<std::byte*>(row.destination + unit.offset);
        auto* from = reinterpret_cast<std::byte*>(row.source + unit.offset);
        if (nbytes == 0) {
            continue;
        }
        // Neighbours on both sides are one vector: the kernel's cost is per vector and per page.
        if (count != 0 && end_of(here[count - 1]) == to && end_of(there[count - 1]) == from) {
            here[count - 1].iov_len += nbytes;
            there[count - 1].iov_len += nbytes;
            continue;
        }
        here[count] = {to, nbytes};
        there[count] = {from, nbytes};
        row_of[count++] = i;
    }
    std::uint32_t num_read = unit.row_end;  // rows before it are there
    for (std::size_t at = 0; at < count;) {
        const ssize_t got = ::process_vm_readv(session_->peer.pid, &here[at], count - at,
                                               &there[at], count - at, 0);
        if (got <= 0) {
            const int error = got < 0 ? errno : EFAULT;
            // Of the rows that make up this vector, those before its address were read.
            const auto stopped_at = reinterpret_cast<std::uint64_t>(here[at].iov_base);
            num_read = row_of[at];
            while (unit.nbytes == 0 && num_read + 1 < unit.row_end &&
                   rows_[num_read].destination + rows_[num_read].nbytes <= stopped_at) {
                ++num_read;
            }
            fail(failure_of(error, num_read));
            break;
        }
        // A partial read stops at a whole vector or at the page that faults: go on behind it.
        auto rest = static_cast<std::size_t>(got);
        while (at < count && rest >= here[at].iov_len) {
            rest -= here[at++].iov_len;
        }
        if (rest != 0) {
            for (iovec* part : {&here[at], &there[at]}) {
                part->iov_base = static_cast<std::byte*>(part->iov_base) + rest;
                part->iov_len -= rest;
            }
        }
    }
    if (session_->is_void()) {
        fail({Scope::kPeer, ESRCH, unit.row_begin});
        return;
    }
    for (std::uint32_t i = unit.row_begin; i < num_read; ++i) {
        tally.bytes += unit.nbytes != 0 ? unit.nbytes : rows_[i].nbytes;
        if (rows_[i].immediate >= 0 && (unit.nbytes == 0 || units_.take_piece(i))) {
            tally.add(target_->board().mark(static_cast<std::uint32_t>(rows_[i].immediate)));
        }
    }
}

void PullJob::fail(const Failure& failure) noexcept {
    if (!has_failed_.exchange(true)) {
        failure_ = failure;
    }
}

void PullJob::finish() noexcept {
    complete(*session_, entry_, has_failed_.load() ? &failure_ : nullptr);
}

}  // namespace

std::shared_ptr<LocalTarget> make_pull_target(EngineContext& context, Reactor& reactor,
                                              CopyPool& pool, Descriptor descriptor,
                                              TargetSpec spec) {
    auto target = std::make_shared<PullTarget>(context, reactor, pool, std::move(descriptor),
                                               std::move(spec));
    target->start();
    return target;
}

}  // namespace weightsync::local
