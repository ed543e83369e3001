// The sink's memory is private: batches are announced through a channel and the sink reads them.
#include <sys/epoll.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <deque>
#include <thread>

#include "remote.hpp"

namespace weightsync::local {

namespace {

constexpr std::chrono::microseconds kPoll{50};

class PullRemote final : public LocalRemote, public Announcer {
  public:
    PullRemote(EngineContext& context, net::Reactor& reactor, CopyPool& pool, PullMemory& memory,
               Peer peer, EventFd completion, std::vector<UniqueFd> fds)
        : LocalRemote(context, reactor, pool, std::move(peer)),
          memory_(memory),
          completion_(std::move(completion)) {
        constexpr std::size_t kControlDoorbellChannel = 3;
        if (fds.size() != kControlDoorbellChannel) {
            throw Error(Scope::kTransfer, peer_.label + " sent too few descriptors");
        }
        const ControlView view = read_control(fds[0].get(), Mode::kPull);
        if (sealed_bytes(fds[2].get()) < sizeof(Channel)) {
            throw Error(Scope::kTransfer, peer_.label + " sent a channel that is too short");
        }
        doorbell_ = EventFd(std::move(fds[1]));
        mapping_ = std::make_unique<Mapping>(fds[2].get(), file_bytes(sizeof(Channel)));
        if (channel().magic != kMagic) {
            throw Error(Scope::kTransfer, peer_.label + " sent a damaged channel");
        }
        std::vector<Range> ranges;
        for (const ControlRange& range : view.ranges) {
            ranges.push_back({range.arena_offset, range.nbytes, 0});
        }
        info_->peer = peer_.label;
        info_->generation = view.generation;
        info_->chunk_bits = view.slots->chunk_bits();
        info_->ranges = RangeTable(std::move(ranges));
    }

    ~PullRemote() override {
        unwatch();
        reactor_.unwatch(completion_watch_);
    }

    void start() override {
        LocalRemote::start();
        memory_.add(std::static_pointer_cast<PullRemote>(shared_from_this()));
        const auto on_completion = [weak = weak_from_this()](std::uint32_t) {
            if (const auto self = std::static_pointer_cast<PullRemote>(weak.lock())) {
                self->completion_.drain();
                self->reap();
            }
            return false;
        };
        completion_watch_ = reactor_.watch(completion_.get(), EPOLLIN, on_completion);
    }

    void post(std::shared_ptr<Operation> operation) override {
        std::optional<Error> error = peer_error();
        if (!error) {
            const std::lock_guard lock(mutex_);
            if (!is_closed_) {
                waiting_.push_back(std::move(operation));
                feed();
                return;
            }
            error = closed_error();
        }
        operation->finish(std::move(error));
    }

    void announce(std::chrono::steady_clock::time_point end) noexcept override {
        const auto nothing = std::make_shared<Operation>(context_, info_, std::vector<Write>{},
                                                         std::vector<LeaseState*>{});
        post(nothing);
        while (!nothing->is_done() && std::chrono::steady_clock::now() < end) {
            std::this_thread::sleep_for(kPoll);
        }
        if (nothing->error() != nullptr) {  // it is at its end
            await_end(end);
        }
    }

    void notify(std::span<const std::int32_t> /*immediates*/) override {
        throw Error(Scope::kConfig, "nothing of " + info_->peer + " is mapped here");
    }

    void close() noexcept override {
        unwatch();
        reactor_.unwatch(completion_watch_);
        // A stopped sink may read our memory much later; it will find that nothing of it counts.
        channel().is_withdrawn.store(1, std::memory_order_seq_cst);
        peer_.socket.reset();
        bool has_told = false;
        {
            const std::lock_guard lock(mutex_);
            has_told = has_told_;
        }
        if (has_told) {
            await_end(std::chrono::steady_clock::now() + kPatience);
        }
        fail_all(closed_error());
    }

  private:
    [[nodiscard]] Channel& channel() const noexcept {
        return *reinterpret_cast<Channel*>(mapping_->data());
    }
    [[nodiscard]] bool is_closed_by_peer() const noexcept override {
        return channel().is_closed.load(std::memory_order_seq_cst) != 0;
    }
    [[nodiscard]] Error closed_error() const {
        return Error(
            Scope::kTransfer,
            "the remote to " + info_->peer + " was closed while an operation was in flight",
            Facts{{"peer", info_->peer}});
    }

    // Until the sink has let go of this source.
    void await_end(std::chrono::steady_clock::time_point end) const noexcept {
        while (channel().has_let_go.load(std::memory_order_acquire) == 0 &&
               std::chrono::steady_clock::now() < end && !has_exited(peer_.pidfd.get())) {
            std::this_thread::sleep_for(kPoll);
        }
    }

    // Moves waiting operations into free entries of the channel. With mutex_ held.
    void feed() {
        bool has_posted = false;
        while (!waiting_.empty()) {
            const std::size_t at = next_entry_ % Channel::kCapacity;
            Batch& batch = in_flight_[at];
            if (batch.operation) {
                break;
            }
            ChannelEntry& entry = channel().entries[at];
            batch = {std::move(waiting_.front()), memory_.notes()};
            waiting_.pop_front();
            entry.table_address = reinterpret_cast<std::uint64_t>(batch.operation->rows().data());
            entry.num_rows = batch.operation->rows().size();
            entry.notes_version = 0;
            if (batch.notes) {
                has_told_ = true;
                entry.notes_version = batch.notes->version;
                entry.notes_address = reinterpret_cast<std::uint64_t>(batch.notes->bytes.data());
                entry.notes_nbytes = batch.notes->bytes.size();
            }
            entry.state.store(ChannelEntry::kPosted, std::memory_order_release);
            ++next_entry_;
            has_posted = true;
        }
        if (has_posted) {
            doorbell_.signal();
        }
    }

    // Finishes what the sink has completed. On the reactor's thread.
    void reap() {
        std::vector<std::pair<std::shared_ptr<Operation>, std::optional<Error>>> finished;
        {
            const std::lock_guard lock(mutex_);
            for (std::size_t i = 0; i < in_flight_.size(); ++i) {
                ChannelEntry& entry = channel().entries[i];
                if (!in_flight_[i].operation ||
                    entry.state.load(std::memory_order_acquire) != ChannelEntry::kDone) {
                    continue;
                }
                finished.emplace_back(std::move(in_flight_[i].operation), error_of(entry));
                in_flight_[i] = {};
                entry.state.store(ChannelEntry::kFree, std::memory_order_relaxed);
            }
            feed();
        }
        for (auto& [operation, error] : finished) {
            operation->finish(std::move(error));
        }
    }

    [[nodiscard]] std::optional<Error> error_of(const ChannelEntry& entry) const {
        if (entry.scope < 0) {
            return std::nullopt;
        }
        const auto scope =
            entry.scope < kNumScopes ? static_cast<Scope>(entry.scope) : Scope::kTransfer;
        Facts facts{{"peer", info_->peer},
                    {"row", std::int64_t{entry.row}},
                    {"errno", std::int64_t{entry.error}}};
        std::string detail = info_->peer;
        if (scope == Scope::kFenced) {
            detail += " fenced or closed its target of generation " +
                      std::to_string(info_->generation) + "; connect to its next one";
        } else if (scope == Scope::kConfig) {
            detail += " refused the batch: write " + std::to_string(entry.row) +
                      " leaves its exported ranges; nothing was written";
        } else {
            detail += " could not read write " + std::to_string(entry.row) +
                      " from this process: " + memory_.error_text(entry.error);
        }
        return Error(scope, std::move(detail), std::move(facts));
    }

    void fail_all(const Error& error) noexcept {
        std::vector<std::shared_ptr<Operation>> failed;
        {
            const std::lock_guard lock(mutex_);
            is_closed_ = true;
            for (Batch& batch : in_flight_) {
                if (batch.operation) {
                    failed.push_back(std::move(batch.operation));
                    batch = {};
                }
            }
            std::ranges::move(waiting_, std::back_inserter(failed));
            waiting_.clear();
        }
        for (const auto& operation : failed) {
            operation->finish(error);
        }
    }

    void on_peer_gone() override {
        reap();  // what was completed before is complete
        if (const std::optional<Error> error = peer_error()) {
            fail_all(*error);
        }
    }

    struct Batch {
        std::shared_ptr<Operation> operation;
        std::shared_ptr<const Notes> notes;
    };

    PullMemory& memory_;
    EventFd completion_;
    EventFd doorbell_{UniqueFd()};
    std::unique_ptr<Mapping> mapping_;
    std::uint64_t completion_watch_ = 0;
    std::mutex mutex_;
    bool is_closed_ = false;
    bool has_told_ = false;  // the sink may have opened what notes named
    std::uint64_t next_entry_ = 0;
    std::array<Batch, Channel::kCapacity> in_flight_;
    std::deque<std::shared_ptr<Operation>> waiting_;
};

}  // namespace

std::shared_ptr<LocalRemote> make_pull_remote(EngineContext& context, net::Reactor& reactor,
                                              CopyPool& pool, PullMemory& memory, Peer peer,
                                              EventFd completion, std::vector<UniqueFd> fds) {
    return std::make_shared<PullRemote>(context, reactor, pool, memory, std::move(peer),
                                        std::move(completion), std::move(fds));
}

}  // namespace weightsync::local
