#include "remote.hpp"

#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>

#include "../../net/handshake.hpp"

namespace weightsync::ofi {

namespace {

using net::bytes_of;

// Bounds how long one write holds a rail, and how much is sent again when one fails.
constexpr std::uint64_t kMaxPieceBytes = std::uint64_t{4} << 20;
// The sink opens or fences a rail in no more than this, or is asked again.
constexpr std::chrono::seconds kAnswerTime{2};

Error closed_error(const RemoteInfo& info) {
    return Error(Scope::kTransfer,
                 "the remote to " + info.peer + " was closed while an operation was in flight",
                 Facts{{"peer", info.peer}});
}

Facts facts_of(const RemoteInfo& info) {
    return {{"peer", info.peer}, {"generation", static_cast<std::int64_t>(info.generation)}};
}

}  // namespace

OfiRemote::OfiRemote(net::Reactor& reactor, const Rails& rails,
                     std::shared_ptr<const LocalMemory> memory, std::shared_ptr<RemoteInfo> info,
                     std::unique_ptr<net::Channel> channel)
    : reactor_(reactor), rails_(rails), info_(std::move(info)), channel_(std::move(channel)) {
    outbox_->ranges = std::shared_ptr<const RangeTable>(info_, &info_->ranges);
    outbox_->memory = std::move(memory);
}

void OfiRemote::start(const TargetView& view, const Deadline& deadline) {
    std::uint64_t max_piece = kMaxPieceBytes;
    for (const auto& rail : rails_) {
        max_piece = std::min(max_piece, rail->domain()->max_message_bytes());
    }
    num_sink_rails_ = view.rails.size();
    const std::size_t num_paths = std::max(rails_.size(), num_sink_rails_);
    outbox_->has_work = std::make_unique<std::atomic<bool>[]>(num_paths);
    outbox_->queue = std::make_unique<SendQueue>(
        num_paths, std::max<std::uint64_t>(max_piece, 1),
        [has_work = outbox_->has_work.get(), rails = rails_](std::size_t path) {
            has_work[path].store(true, std::memory_order_seq_cst);
            rails[path % rails.size()]->wake();
        });
    paths_.resize(num_paths);
    for (std::size_t i = 0; i < num_paths; ++i) {
        Path& path = paths_[i];
        path.rail = i % rails_.size();
        path.sink_rail = i % num_sink_rails_;
        try {
            build(i, std::make_shared<const TargetView::RailView>(view.rails[path.sink_rail]));
        } catch (const Error& error) {
            last_failure_ = error;
            path.sink_attempt = view.rails[path.sink_rail].attempt;
            postpone(path);
            path.is_settled = true;
            ++num_settled_;
        }
    }
    if (std::ranges::none_of(paths_, [](const Path& path) { return path.source != nullptr; })) {
        throw Error(*last_failure_);
    }
    for (const Path& path : paths_) {
        if (path.source) {
            rails_[path.rail]->add(path.source);
        }
    }
    watch();  // from here on paths are the reactor's
    const auto is_settled = [&] {
        return has_failed_.load() || (num_settled_.load() >= num_paths && is_proven_.load());
    };
    const bool is_ready = wait_until(changed_, is_settled, deadline);
    const std::lock_guard lock(mutex_);
    if (error_) {
        throw Error(*error_);
    }
    if (!is_ready && !is_proven_) {
        throw Error(Scope::kTimeout,
                    info_->peer + " does not answer over " + rails_.front()->domain()->label() +
                        "; is it stopped, or its rail down?",
                    facts_of(*info_));
    }
}

void OfiRemote::build(std::size_t index, std::shared_ptr<const TargetView::RailView> sink) {
    Path& path = paths_[index];
    const std::uint64_t attempt = sink->attempt;
    auto source = std::make_shared<SourcePath>(PathSpec{index, path.number + 1, rails_[path.rail],
                                                        path.rail, std::move(sink), info_->peer},
                                               weak_from_this(), outbox_);
    const std::lock_guard lock(mutex_);
    ++path.number;
    path.sink_attempt = attempt;
    path.source = std::move(source);
}

void OfiRemote::watch() {
    const auto add = [&](int fd, std::uint32_t events, auto handler) {
        watches_.push_back(
            reactor_.watch(fd, events, [weak = weak_from_this(), handler](std::uint32_t) {
                if (const auto self = weak.lock()) {
                    handler(*self);
                }
                return false;
            }));
    };
    add(notice_event_.get(), EPOLLIN, [](OfiRemote& self) { self.on_notices(); });
    add(timer_.get(), EPOLLIN, [](OfiRemote& self) { self.on_timer(); });
    add(channel_->socket(), EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET,
        [](OfiRemote& self) { self.on_control(); });
    timer_.set(std::chrono::nanoseconds(1));  // for those that were postponed
}

void OfiRemote::tell(std::size_t path, std::uint64_t number, News news,
                     std::optional<Error> error) noexcept {
    {
        const std::lock_guard lock(mutex_);
        notices_.push_back({path, number, news, std::move(error)});
    }
    notice_event_.signal();
}

void OfiRemote::send(FrameType type, std::span<const std::byte> payload) {
    // A broken connection is noticed where it is read.
    [[maybe_unused]] const bool is_sent = channel_->send(static_cast<std::uint8_t>(type), payload);
}

void OfiRemote::on_control() {
    bool is_alive = false;
    try {
        is_alive = channel_->flush() &&
                   channel_->receive([this](const net::Frame& frame) { on_frame(frame); });
    } catch (const Error& error) {
        end(Error(Scope::kPeer, info_->peer + " talks nonsense: " + error.detail(),
                  facts_of(*info_)));
    }
    if (!is_alive) {
        end(Error(Scope::kPeer, info_->peer + " is gone; plan again without it", facts_of(*info_)));
    }
}

void OfiRemote::on_frame(const net::Frame& frame) {
    if (has_failed_) {
        return;
    }
    switch (static_cast<FrameType>(frame.type)) {
        case FrameType::kFenced:
        case FrameType::kClosed:
            end(Error(Scope::kFenced,
                      info_->peer + " fenced or closed its target of generation " +
                          std::to_string(info_->generation) + "; connect to its next one",
                      facts_of(*info_)));
            return;
        case FrameType::kRailFenced:
            on_rail_fenced(decode_frame<RailAttempt>(frame.payload), true);
            return;
        case FrameType::kRailMoved:
            on_rail_fenced(decode_frame<RailAttempt>(frame.payload), false);
            return;
        case FrameType::kRefused:
            on_refused(decode_frame<RailAttempt>(frame.payload));
            return;
        case FrameType::kRailOpen:
            rail_reader_.emplace(frame.payload, num_sink_rails_, info_->ranges.ranges().size());
            break;
        case FrameType::kRailKeys:
            if (rail_reader_) {
                rail_reader_->take(frame.payload);
            }
            break;
        case FrameType::kPong: {
            const auto which = decode_frame<PathAttempt>(frame.payload);
            // The last one is never given up for standing still: deadlines decide.
            const auto is_usable = [](const Path& path) {
                return path.source && path.health.state() == PathState::kActive;
            };
            if (which.path < paths_.size() && paths_[which.path].number == which.attempt &&
                paths_[which.path].source &&
                std::ranges::count_if(paths_, is_usable) >
                    (is_usable(paths_[which.path]) ? 1 : 0)) {
                paths_[which.path].source->condemn();
            }
            return;
        }
        default:
            return;  // of a later version
    }
    if (rail_reader_ && rail_reader_->is_whole()) {
        const std::size_t rail = rail_reader_->rail();
        TargetView::RailView view = rail_reader_->finish();
        rail_reader_.reset();
        on_rail_open(rail, std::move(view));
    }
}

void OfiRemote::on_notices() {
    notice_event_.drain();
    std::vector<Notice> notices;
    {
        const std::lock_guard lock(mutex_);
        notices.swap(notices_);
    }
    for (const Notice& notice : notices) {
        Path& path = paths_[notice.path];
        if (has_failed_ || path.number != notice.number || !path.source) {
            continue;
        }
        switch (notice.news) {
            case News::kProven: {
                is_proven_ = true;
                const std::lock_guard lock(mutex_);
                path.health.succeeded(Clock::now());
                break;
            }
            case News::kFailed:
                on_path_failed(notice.path, *notice.error);
                break;
            case News::kStalled:
                send(FrameType::kPing, bytes_of(PathAttempt{notice.path, notice.number}));
                continue;
            case News::kClosed:
                // The sink had closed its rail for another source's sake.
                path.source.reset();
                if (path.health.is_usable()) {
                    ask_to_open(notice.path);
                }
                set_timer();
                continue;
            case News::kFatal:
                end(*notice.error);
                continue;
        }
        if (!std::exchange(path.is_settled, true)) {
            ++num_settled_;
        }
        weightsync::wake(changed_);
    }
}

void OfiRemote::on_path_failed(std::size_t index, const Error& error) {
    Path& path = paths_[index];
    last_failure_ = error;
    {
        const std::lock_guard lock(mutex_);
        if (!path.health.fail(Clock::now())) {
            return;
        }
    }
    ask_to_fence(path);
    set_timer();
}

void OfiRemote::ask_to_fence(Path& path) {
    path.asked_time = Clock::now();
    send(FrameType::kFenceRail, bytes_of(RailAttempt{path.sink_rail, path.sink_attempt}));
}

void OfiRemote::on_rail_fenced(RailAttempt which, bool is_ours) {
    for (std::size_t i = 0; i < paths_.size(); ++i) {
        Path& path = paths_[i];
        if (path.sink_rail != which.rail || path.sink_attempt > which.attempt || !path.source) {
            continue;
        }
        path.source->release();
        if (path.health.state() != PathState::kFencing) {
            path.source->retire();  // it is built again as soon as it is closed
            continue;
        }
        path.source.reset();
        {
            const std::lock_guard lock(mutex_);
            is_ours ? path.health.fenced(Clock::now()) : path.health.absolved();
        }
        if (!is_ours) {
            ask_to_open(i);
        }
    }
    end_if_last();
    set_timer();
}

// Or it waits for those that were given up.
void OfiRemote::end_if_last() {
    const auto is_there = [](const Path& path) {
        return path.health.is_usable() || path.health.state() == PathState::kFencing;
    };
    if (std::ranges::any_of(paths_, is_there)) {
        return;
    }
    end(Error(Scope::kRail,
              "no rail to " + info_->peer + " works any more, while it still answers; the last: " +
                  (last_failure_ ? last_failure_->detail() : "closed by the peer"),
              facts_of(*info_)));
}

void OfiRemote::ask_to_open(std::size_t index) {
    Path& path = paths_[index];
    path.is_opening = true;
    path.asked_time = Clock::now();
    send(FrameType::kOpenRail, bytes_of(RailAttempt{path.sink_rail, path.sink_attempt}));
}

void OfiRemote::on_rail_open(std::size_t rail, TargetView::RailView view) {
    const auto shared = std::make_shared<const TargetView::RailView>(std::move(view));
    for (std::size_t i = 0; i < paths_.size(); ++i) {
        Path& path = paths_[i];
        if (path.sink_rail != rail || !path.is_opening || shared->attempt <= path.sink_attempt) {
            continue;
        }
        path.is_opening = false;
        try {
            build(i, shared);
            {
                const std::lock_guard lock(mutex_);
                path.health.probing();
            }
            rails_[path.rail]->add(path.source);
        } catch (const Error& error) {
            last_failure_ = error;
            path.source.reset();
            postpone(path);
        }
    }
    end_if_last();
    set_timer();
}

void OfiRemote::on_refused(RailAttempt which) {
    for (Path& path : paths_) {
        if (path.sink_rail != which.rail) {
            continue;
        }
        if (path.health.state() == PathState::kFencing) {
            // What it holds can neither be sent again nor be forgotten.
            end(last_failure_ ? *last_failure_ : Error(Scope::kRail, "a rail failed"));
            return;
        }
        if (std::exchange(path.is_opening, false)) {
            postpone(path);
        }
    }
    end_if_last();
    set_timer();
}

void OfiRemote::postpone(Path& path) {
    const std::lock_guard lock(mutex_);
    const auto now = Clock::now();
    if (path.health.fail(now)) {
        path.health.fenced(now);
    } else {
        path.health.probe_failed(now);
    }
}

void OfiRemote::on_timer() {
    timer_.drain();
    if (has_failed_) {
        return;
    }
    const auto now = Clock::now();
    for (std::size_t i = 0; i < paths_.size(); ++i) {
        Path& path = paths_[i];
        const bool is_late = now - path.asked_time >= kAnswerTime;
        if (path.health.state() == PathState::kFencing) {
            if (is_late) {
                ask_to_fence(path);
            }
        } else if (path.is_opening) {
            if (is_late) {
                ask_to_open(i);
            }
        } else if (path.health.state() == PathState::kQuarantined &&
                   path.health.probe_time() <= now) {
            {
                const std::lock_guard lock(mutex_);
                path.health.begin_probe();
            }
            ask_to_open(i);
        }
    }
    set_timer();
}

void OfiRemote::set_timer() {
    auto next = Clock::time_point::max();
    for (const Path& path : paths_) {
        if (path.health.state() == PathState::kFencing || path.is_opening) {
            next = std::min(next, path.asked_time + kAnswerTime);
        } else if (path.health.state() == PathState::kQuarantined) {
            next = std::min(next, path.health.probe_time());
        }
    }
    if (next != Clock::time_point::max()) {
        timer_.set(std::max(next - Clock::now(), Clock::duration(1)));
    }
}

void OfiRemote::end(const Error& error) noexcept {
    std::vector<std::shared_ptr<SourcePath>> sources;
    {
        const std::lock_guard lock(mutex_);
        if (error_) {
            return;
        }
        error_ = error;
        has_failed_.store(true);
        for (const Path& path : paths_) {
            if (path.source) {
                sources.push_back(path.source);
            }
        }
    }
    if (outbox_->queue) {
        outbox_->queue->fail(error);
    }
    for (const auto& source : sources) {
        source->close();
        source->release();
    }
    weightsync::wake(changed_);
}

void OfiRemote::post(std::shared_ptr<Operation> operation) {
    outbox_->queue->push(std::move(operation));
}

void OfiRemote::notify(std::span<const std::int32_t> /*immediates*/) {
    throw Error(Scope::kConfig, "nothing of " + info_->peer + " is mapped here");
}

void OfiRemote::close() noexcept {
    if (is_closed_.exchange(true)) {
        return;
    }
    for (const std::uint64_t watch : watches_) {
        reactor_.unwatch(watch);
    }
    end(closed_error(*info_));
    // Only now: a sink that sees the hang-up counts on nothing of ours being on its way.
    channel_.reset();
}

std::string_view OfiRemote::state_of(std::size_t rail) const {
    const std::lock_guard lock(mutex_);
    std::string_view worst = "idle";
    for (const Path& path : paths_) {
        if (!error_ && path.rail == rail) {
            const auto state = static_cast<std::size_t>(path.health.state());
            worst = worse_state(worst, kPathStateNames[state]);
        }
    }
    return worst;
}

}  // namespace weightsync::ofi
