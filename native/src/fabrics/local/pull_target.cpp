// The sink pulls: private memory is written by its own threads only, so a fence is a closed gate.
#include <sys/epoll.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <functional>
#include <limits>

#include "target.hpp"

namespace weightsync::local {

namespace {

struct Failure {
    Scope scope = Scope::kInternal;
    int error = 0;
    std::uint32_t row = 0;
};

// `error`: as Pulled's.
Failure failure_of(int error, std::uint32_t row) noexcept {
    // EFAULT: the source unmapped what it promised to hold. EPERM: ptrace limits.
    return {error == ESRCH ? Scope::kPeer : Scope::kMemory, error, row};
}

class PullTarget;

class PullJob final : public Job {
  public:
    PullJob(std::shared_ptr<PullTarget> target, std::shared_ptr<Session> session,
            std::shared_ptr<const Imports> imports, ChannelEntry& entry, std::vector<Write> rows,
            CopyUnits units)
        : Job(units.units.size()),
          target_(std::move(target)),
          session_(std::move(session)),
          imports_(std::move(imports)),
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
    std::shared_ptr<const Imports> imports_;
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

// Does one thing on a thread of the pool.
class Chore final : public Job {
  public:
    explicit Chore(std::function<void()> body) : Job(1), body_(std::move(body)) {}
    void run(std::size_t /*unit*/) noexcept override { body_(); }
    void finish() noexcept override {}

  private:
    std::function<void()> body_;
};

class PullTarget final : public LocalTarget {
  public:
    PullTarget(EngineContext& context, net::Reactor& reactor, CopyPool& pool, PullMemory& memory,
               Descriptor descriptor, TargetSpec spec)
        : LocalTarget(context, reactor, std::move(descriptor), std::move(spec)),
          pool_(pool),
          memory_(memory.sink_memory(spec_)),
          control_(write_control(spec_, Mode::kPull, {})),
          board_(spec_.make_board(context_.progress.event.get())) {}

    ~PullTarget() override { reactor_.unwatch(doorbell_watch_); }

    void start() {
        const auto on_doorbell = [weak = weak_from_this()](std::uint32_t) {
            if (const auto self = std::static_pointer_cast<PullTarget>(weak.lock())) {
                self->on_doorbell();
            }
            return false;
        };
        doorbell_watch_ = reactor_.watch(doorbell_.get(), EPOLLIN, on_doorbell);
    }

    [[nodiscard]] Board& board() noexcept override { return board_; }
    [[nodiscard]] Gate& gate() noexcept { return gate_; }
    [[nodiscard]] SinkMemory& memory() noexcept { return *memory_; }

    void fence(bool /*discard*/) override { close(); }

    void close() noexcept override {
        gate_.close();
        std::vector<std::shared_ptr<Session>> with_imports;
        {
            const std::lock_guard lock(mutex_);
            for (auto& [id, session] : sessions_) {
                session->channel().is_closed.store(1, std::memory_order_seq_cst);
                session->source_event.signal();
                if (session->imports) {
                    with_imports.push_back(session);
                } else {
                    session->channel().has_let_go.store(1, std::memory_order_release);
                }
            }
        }
        drop_sessions();
        if (!with_imports.empty()) {
            let_go_later(std::move(with_imports));
        }
    }

  private:
    void let_go(Session& session) noexcept override {
        std::shared_ptr<const Imports> imports;
        {
            const std::lock_guard lock(mutex_);
            imports = std::move(session.imports);
        }
        if (imports) {
            imports->close();
        }
        session.channel().has_let_go.store(1, std::memory_order_release);
    }

    // Closing imports may take a driver longer than a fence may take.
    void let_go_later(std::vector<std::shared_ptr<Session>> sessions) noexcept {
        const auto all = [self = std::static_pointer_cast<PullTarget>(shared_from_this()),
                          sessions = std::move(sessions)] {
            for (const auto& session : sessions) {
                self->let_go(*session);
            }
        };
        try {
            pool_.submit(std::make_shared<Chore>(all));
        } catch (const Error&) {  // the engine is closing
            all();
        }
    }

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
        const Span span{reinterpret_cast<std::uint64_t>(&value), request.probe_address,
                        sizeof(value)};
        if (const int error = pull_from_host(session.peer.pid, std::span(&span, 1)).error;
            error != 0) {
            throw os_error(Scope::kMemory, "process_vm_readv", error,
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
        const Pass pass(gate_);  // what is opened here is there for close() to see
        if (!pass) {
            refuse({Scope::kFenced, 0, 0});
            return;
        }
        if (num_rows > kMaxRows) {
            refuse({Scope::kConfig, 0, 0});
            return;
        }
        std::vector<Write> rows(num_rows);
        int error = read(*session, table_address, std::as_writable_bytes(std::span(rows)));
        if (error == 0) {
            error = follow_notes(*session, entry);
        }
        if (error != 0) {
            refuse(failure_of(error, 0));
            return;
        }
        std::size_t hint = 0;
        for (std::size_t i = 0; i < rows.size(); ++i) {
            Write& row = rows[i];
            const Range* range = spec_.ranges.find(row.destination, row.nbytes, hint);
            if (range == nullptr || row.nbytes > UINT64_MAX - row.source ||
                row.immediate < kNoImmediate ||
                row.immediate > std::numeric_limits<std::int32_t>::max()) {
                refuse({Scope::kConfig, 0, static_cast<std::uint32_t>(i)});
                return;
            }
            row.destination = range->base + (row.destination - range->arena_offset);
        }
        std::shared_ptr<const Imports> imports;
        {
            const std::lock_guard lock(mutex_);
            imports = session->imports;
        }
        CopyUnits units =
            cut_units(rows, memory_->unit_bytes(imports.get()), SinkMemory::kMaxSpans);
        const auto self = std::static_pointer_cast<PullTarget>(shared_from_this());
        const auto job = std::make_shared<PullJob>(self, session, std::move(imports), entry,
                                                   std::move(rows), std::move(units));
        try {
            pool_.submit(job);
        } catch (const Error&) {  // the engine is closing
            refuse({Scope::kFenced, 0, 0});
        }
    }

    // What a source keeps in its memory for us. Returns 0, or an error as Pulled's.
    [[nodiscard]] static int read(const Session& session, std::uint64_t address,
                                  std::span<std::byte> bytes) noexcept {
        if (!bytes.empty()) {
            const Span span{reinterpret_cast<std::uint64_t>(bytes.data()), address, bytes.size()};
            const Pulled pulled = pull_from_host(session.peer.pid, std::span(&span, 1));
            if (pulled.error != 0) {
                return pulled.error;
            }
        }
        return session.is_void() ? ESRCH : 0;  // it may have been something else already
    }

    // Opens what the source says of its memory, if it says something new.
    [[nodiscard]] int follow_notes(Session& session, const ChannelEntry& entry) {
        constexpr std::uint64_t kMaxNotes = std::uint64_t{64} << 20;
        const std::uint64_t version = entry.notes_version;
        const std::uint64_t nbytes = entry.notes_nbytes;
        if (version == 0 || version == session.notes_version) {
            return 0;
        }
        if (nbytes > kMaxNotes) {
            return EINVAL;
        }
        std::vector<std::byte> notes(nbytes);
        if (const int error = read(session, entry.notes_address, notes); error != 0) {
            return error;
        }
        std::shared_ptr<const Imports> before;
        {
            const std::lock_guard lock(mutex_);
            before = session.imports;
        }
        SinkMemory::Opened opened = memory_->open(session.peer, notes, before);
        const std::lock_guard lock(mutex_);
        session.imports = std::move(opened.imports);
        session.notes_version = opened.error == 0 ? version : 0;  // else asked for again
        return opened.error;
    }

    CopyPool& pool_;
    std::shared_ptr<SinkMemory> memory_;
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
    std::array<Span, SinkMemory::kMaxSpans> spans;
    std::array<std::uint32_t, SinkMemory::kMaxSpans> row_of;  // the first of each
    std::size_t count = 0;
    for (std::uint32_t i = unit.row_begin; i < unit.row_end; ++i) {
        const Write& row = rows_[i];
        const Span span{row.destination + unit.offset, row.source + unit.offset,
                        unit.nbytes != 0 ? unit.nbytes : row.nbytes};
        if (span.nbytes == 0) {
            continue;
        }
        // Neighbours on both sides are one: a call's cost is per span and per page.
        if (count != 0 && spans[count - 1].to + spans[count - 1].nbytes == span.to &&
            spans[count - 1].from + spans[count - 1].nbytes == span.from) {
            spans[count - 1].nbytes += span.nbytes;
            continue;
        }
        spans[count] = span;
        row_of[count++] = i;
    }
    std::uint32_t num_read = unit.row_end;  // rows before it are there
    const Pulled pulled = count == 0 ? Pulled{}
                                     : target_->memory().pull(session_->peer, imports_.get(),
                                                              std::span(spans.data(), count));
    if (pulled.error != 0) {
        // Of the rows that make up this span, those before its end were read.
        const std::uint64_t stopped_at = spans[pulled.num_spans].to + pulled.nbytes;
        num_read = row_of[pulled.num_spans];
        while (unit.nbytes == 0 && num_read + 1 < unit.row_end &&
               rows_[num_read].destination + rows_[num_read].nbytes <= stopped_at) {
            ++num_read;
        }
        fail(failure_of(pulled.error, num_read));
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

std::shared_ptr<LocalTarget> make_pull_target(EngineContext& context, net::Reactor& reactor,
                                              CopyPool& pool, PullMemory& memory,
                                              Descriptor descriptor, TargetSpec spec) {
    auto target = std::make_shared<PullTarget>(context, reactor, pool, memory,
                                               std::move(descriptor), std::move(spec));
    target->start();
    return target;
}

}  // namespace weightsync::local
