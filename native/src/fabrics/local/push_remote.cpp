// Writes go straight into the sink's memfd, mapped here; the writer sets the bits itself.
#include <sys/epoll.h>

#include <algorithm>

#include "remote.hpp"

namespace weightsync::local {

void LocalRemote::start() {
    const auto on_gone = [weak = weak_from_this()](std::uint32_t) {
        if (const auto self = weak.lock()) {
            self->unwatch();
            self->is_peer_gone_.store(true);
            self->on_peer_gone();
        }
        return false;
    };
    socket_watch_ = reactor_.watch(peer_.socket.get(), EPOLLRDHUP | EPOLLHUP | EPOLLERR, on_gone);
    pidfd_watch_ = reactor_.watch(peer_.pidfd.get(), EPOLLIN, on_gone);
}

void LocalRemote::unwatch() noexcept {
    reactor_.unwatch(socket_watch_);
    reactor_.unwatch(pidfd_watch_);
}

std::optional<Error> LocalRemote::peer_error() const {
    Facts facts{{"peer", info_->peer},
                {"generation", static_cast<std::int64_t>(info_->generation)}};
    if (is_closed_by_peer()) {
        return Error(Scope::kFenced,
                     info_->peer + " fenced or closed its target of generation " +
                         std::to_string(info_->generation) + "; connect to its next one",
                     std::move(facts));
    }
    if (is_peer_gone_.load() || has_exited(peer_.pidfd.get())) {
        return Error(Scope::kPeer, info_->peer + " is gone; plan again without it",
                     std::move(facts));
    }
    return std::nullopt;
}

namespace {

// Enough for two threads to share a chunk, small against the cost of claiming a unit.
constexpr std::uint64_t kPushUnitBytes = std::uint64_t{1} << 20;
constexpr std::uint32_t kPushUnitRows = 4096;
// Batches up to this size are copied by the caller: waking a worker would take longer.
constexpr std::uint64_t kInlineBytes = std::uint64_t{256} << 10;

class PushRemote final : public LocalRemote {
  public:
    PushRemote(EngineContext& context, net::Reactor& reactor, CopyPool& pool, Peer peer,
               std::vector<UniqueFd> fds)
        : LocalRemote(context, reactor, pool, std::move(peer)) {
        constexpr std::size_t kOthers = 2;
        if (fds.size() < kOthers) {
            throw Error(Scope::kTransfer, peer_.label + " sent too few descriptors");
        }
        ControlView view = read_control(fds[0].get(), Mode::kPush);
        if (fds.size() != kOthers + view.block_bytes.size()) {
            throw Error(Scope::kTransfer, peer_.label + " sent too few descriptors");
        }
        for (std::size_t i = 0; i < view.block_bytes.size(); ++i) {
            const int fd = fds[kOthers + i].get();
            if (sealed_bytes(fd) < view.block_bytes[i]) {
                throw Error(Scope::kMemory, peer_.label + " sent memory shorter than it says");
            }
            blocks_.push_back(std::make_unique<Mapping>(fd, view.block_bytes[i]));
            blocks_.back()->populate();
        }
        std::vector<Range> ranges;
        for (const ControlRange& range : view.ranges) {
            if (range.block >= blocks_.size() || range.nbytes > blocks_[range.block]->nbytes() ||
                range.block_offset > blocks_[range.block]->nbytes() - range.nbytes) {
                throw Error(Scope::kMemory, peer_.label + " exported a range outside its memory");
            }
            const auto base = reinterpret_cast<std::uint64_t>(blocks_[range.block]->data());
            ranges.push_back({range.arena_offset, range.nbytes, base + range.block_offset});
        }
        info_->peer = peer_.label;
        info_->generation = view.generation;
        info_->chunk_bits = view.slots->chunk_bits();
        info_->ranges = RangeTable(std::move(ranges));
        sink_event_ = EventFd(std::move(fds[1]));
        board_.emplace(view.slots, view.board, sink_event_.get(), view.mapping);
    }

    ~PushRemote() override { unwatch(); }

    [[nodiscard]] std::uint64_t mapped_address() const noexcept override {
        return info_->ranges.common_base();
    }

    void post(std::shared_ptr<Operation> operation) override;
    void notify(std::span<const std::int32_t> immediates) override;

    void close() noexcept override {
        gate_.close();
        unwatch();
        peer_.socket.reset();
        blocks_.clear();  // gigabytes; nobody is inside the gate any more
    }

    // Copies rows [begin, end) and announces them; false when the remote was closed.
    [[nodiscard]] bool copy_rows(std::span<const Write> rows, std::uint32_t begin,
                                 std::uint32_t end) noexcept;
    // Copies one piece of a long row, and announces the row with its last piece.
    [[nodiscard]] bool copy_piece(const Write& row, const CopyUnit& unit,
                                  const CopyUnits& units) noexcept;
    void finish(Operation& operation) noexcept;

  private:
    [[nodiscard]] bool is_closed_by_peer() const noexcept override { return !board_->is_open(); }

    std::vector<std::unique_ptr<Mapping>> blocks_;
    EventFd sink_event_{UniqueFd()};
    std::optional<Board> board_;
    Gate gate_;
};

class PushJob final : public Job {
  public:
    PushJob(std::shared_ptr<PushRemote> remote, std::shared_ptr<Operation> operation,
            CopyUnits units)
        : Job(units.units.size()),
          remote_(std::move(remote)),
          operation_(std::move(operation)),
          units_(std::move(units)) {}

    void run(std::size_t unit) noexcept override {
        const CopyUnit& part = units_.units[unit];
        const auto rows = operation_->rows();
        const bool was_copied = part.nbytes == 0
                                    ? remote_->copy_rows(rows, part.row_begin, part.row_end)
                                    : remote_->copy_piece(rows[part.row_begin], part, units_);
        [[maybe_unused]] const bool closed = !was_copied;  // finish() finds out why
    }
    void finish() noexcept override { remote_->finish(*operation_); }

  private:
    std::shared_ptr<PushRemote> remote_;
    std::shared_ptr<Operation> operation_;
    CopyUnits units_;
};

bool PushRemote::copy_rows(std::span<const Write> rows, std::uint32_t begin,
                           std::uint32_t end) noexcept {
    const Pass pass(gate_);
    if (!pass) {
        return false;
    }
    Tally tally;
    std::size_t hint = 0;
    for (std::uint32_t i = begin; i < end; ++i) {
        const Write& row = rows[i];
        const Range* range = info_->ranges.find(row.destination, row.nbytes, hint);
        copy_bytes(
            reinterpret_cast<std::byte*>(range->base + (row.destination - range->arena_offset)),
            reinterpret_cast<const std::byte*>(row.source), row.nbytes);
        tally.bytes += row.nbytes;
        if (row.immediate >= 0) {
            tally.add(board_->mark(static_cast<std::uint32_t>(row.immediate)));
        }
    }
    board_->account(tally);
    return true;
}

bool PushRemote::copy_piece(const Write& row, const CopyUnit& unit,
                            const CopyUnits& units) noexcept {
    const Pass pass(gate_);
    if (!pass) {
        return false;
    }
    std::size_t hint = 0;
    const Range* range = info_->ranges.find(row.destination, row.nbytes, hint);
    const std::uint64_t to = range->base + (row.destination - range->arena_offset) + unit.offset;
    copy_bytes(reinterpret_cast<std::byte*>(to),
               reinterpret_cast<const std::byte*>(row.source + unit.offset), unit.nbytes);
    Tally tally;
    tally.bytes = unit.nbytes;
    if (units.take_piece(unit.row_begin) && row.immediate >= 0) {
        tally.add(board_->mark(static_cast<std::uint32_t>(row.immediate)));
    }
    board_->account(tally);
    return true;
}

void PushRemote::finish(Operation& operation) noexcept {
    std::optional<Error> error = peer_error();
    if (!error && gate_.is_closed()) {
        error.emplace(
            Scope::kTransfer,
            "the remote to " + info_->peer + " was closed while an operation was in flight",
            Facts{{"peer", info_->peer}});
    }
    operation.finish(std::move(error));
}

void PushRemote::post(std::shared_ptr<Operation> operation) {
    if (std::optional<Error> error = peer_error()) {
        operation->finish(std::move(error));
        return;
    }
    const auto rows = operation->rows();
    if (operation->nbytes() <= kInlineBytes) {
        [[maybe_unused]] const bool was_copied =
            copy_rows(rows, 0, static_cast<std::uint32_t>(rows.size()));
        finish(*operation);
        return;
    }
    CopyUnits units = cut_units(rows, kPushUnitBytes, kPushUnitRows);
    const auto job = std::make_shared<PushJob>(
        std::static_pointer_cast<PushRemote>(shared_from_this()), operation, std::move(units));
    try {
        pool_.submit(job);
    } catch (const Error& error) {
        operation->finish(error);
    }
}

void PushRemote::notify(std::span<const std::int32_t> immediates) {
    if (std::optional<Error> error = peer_error()) {
        throw std::move(*error);
    }
    const Pass pass(gate_);
    if (!pass) {
        throw Error(Scope::kConfig, "the remote to " + info_->peer + " is closed");
    }
    store_fence();
    Tally tally;
    for (const std::int32_t immediate : immediates) {
        tally.add(board_->mark(static_cast<std::uint32_t>(immediate)));
    }
    board_->account(tally);
}

}  // namespace

std::shared_ptr<LocalRemote> make_push_remote(EngineContext& context, net::Reactor& reactor,
                                              CopyPool& pool, Peer peer,
                                              std::vector<UniqueFd> fds) {
    return std::make_shared<PushRemote>(context, reactor, pool, std::move(peer), std::move(fds));
}

}  // namespace weightsync::local
