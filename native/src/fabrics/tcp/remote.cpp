#include "remote.hpp"

#include <sys/epoll.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include <weightsync/error.hpp>

namespace weightsync::tcp {

namespace {

constexpr std::chrono::seconds kDialTime{5};
constexpr int kMaxUnanswered = 4;  // a quarter of a second each

template <class Message>
bool decode(const net::Frame& frame, Message& message) noexcept {
    if (frame.payload.size() != sizeof(Message)) {
        return false;
    }
    std::memcpy(&message, frame.payload.data(), sizeof(Message));
    return true;
}

}  // namespace

std::shared_ptr<TcpRemote> TcpRemote::make(const Shared& shared, Descriptor descriptor,
                                           const Deadline& deadline) {
    auto remote = std::make_shared<TcpRemote>(shared, std::move(descriptor));
    remote->connect(deadline);
    return remote;
}

TcpRemote::TcpRemote(const Shared& shared, Descriptor descriptor)
    : shared_(shared), descriptor_(std::move(descriptor)), session_(random_u64()) {}

void TcpRemote::connect(const Deadline& deadline) {
    for (const auto& [host, port] : descriptor_.endpoints) {
        endpoints_.push_back(net::Address::parse(host, port));
    }
    label_ = "tcp " + endpoints_.front().text() + " (pid " + std::to_string(descriptor_.pid) + ")";
    const net::Patience patience{deadline, nullptr};
    auto control = dial_control(patience, false);
    auto [ranges, chunk_bits] = receive_welcome(*control, patience);
    info_->peer = label_;
    info_->generation = descriptor_.generation;
    info_->chunk_bits = chunk_bits;
    info_->ranges = std::move(ranges);

    const std::size_t num_paths = std::max(shared_.rails.size(), endpoints_.size());
    const std::uint64_t window =
        shared_.window_bytes * static_cast<std::uint64_t>(shared_.num_streams);
    // Two blocks, so that one is on its way while the other one is acknowledged.
    const std::uint64_t block = std::min(kBlockBytes, shared_.window_bytes / 2);
    notes_ = std::make_unique<Notes[]>(num_paths);
    queue_ = std::make_unique<SendQueue>(num_paths, block,
                                         [this](std::size_t path) { paths_[path]->wake(); });
    std::optional<Error> path_error;
    std::size_t num_built = 0;
    for (std::size_t i = 0; i < num_paths; ++i) {
        paths_.push_back(std::make_unique<Path>(i, *shared_.rails[i % shared_.rails.size()],
                                                static_cast<PathOwner&>(*this), *queue_, window,
                                                block));
    }
    for (std::size_t i = 0; i < num_paths; ++i) {
        try {
            paths_[i]->attach(dial_path(i, 0, patience), false);
            ++num_built;
        } catch (const Error& error) {
            if (error.scope() != Scope::kPeer && error.scope() != Scope::kRail) {
                throw;
            }
            path_error = error;
            paths_[i]->quarantine();
        }
    }
    if (num_built == 0) {
        throw *path_error;
    }
    event_watch_ = shared_.reactor.watch(event_.get(), EPOLLIN, [this](std::uint32_t) {
        event_.drain();
        on_event();
        return false;
    });
    timer_watch_ = shared_.reactor.watch(timer_.get(), EPOLLIN, [this](std::uint32_t) {
        timer_.drain();
        on_timer();
        return false;
    });
    set_timer();
    use_control(std::move(control));
}

TcpRemote::~TcpRemote() {
    close();
}

net::Hello TcpRemote::hello(net::LinkKind kind) const {
    net::Hello hello;
    hello.kind = kind;
    hello.target_id = descriptor_.target_id;
    hello.generation = descriptor_.generation;
    hello.session = session_;
    return hello;
}

// Over the first address that answers.
std::unique_ptr<net::Channel> TcpRemote::dial_control(const net::Patience& patience,
                                                      bool is_again) {
    std::optional<Error> first;
    for (std::size_t i = 0; i < endpoints_.size(); ++i) {
        net::Patience one = patience;
        if (is_again || endpoints_.size() > 1) {
            // A dead rail must not eat up the time of the others.
            const auto share = std::chrono::duration<double>(
                patience.deadline.remaining(kDialTime) / (endpoints_.size() - i));
            one.deadline = Deadline::after(share.count());
        }
        try {
            return std::make_unique<net::Channel>(
                net::dial(endpoints_[i], shared_.rails[i % shared_.rails.size()]->local,
                          hello(net::LinkKind::kControl), descriptor_.key, label_, one));
        } catch (const Error& error) {
            const Scope scope = error.scope();
            if (scope != Scope::kPeer && scope != Scope::kRail && scope != Scope::kTimeout) {
                throw;
            }
            // A peer that does not answer may be alive: that says more than a refusal.
            if (!first || scope == Scope::kTimeout) {
                first = error;
            }
        }
    }
    throw *first;
}

std::pair<RangeTable, int> TcpRemote::receive_welcome(net::Channel& channel,
                                                      const net::Patience& patience) const {
    std::vector<Range> ranges;
    for (;;) {
        const net::Frame frame = channel.next(patience, label_);
        const auto say = static_cast<Say>(frame.type);
        Welcome welcome;
        if (say == Say::kRanges && frame.payload.size() % sizeof(Range64) == 0) {
            for (std::size_t at = 0; at < frame.payload.size(); at += sizeof(Range64)) {
                Range64 range;
                std::memcpy(&range, frame.payload.data() + at, sizeof(range));
                ranges.push_back({range.arena_offset, range.nbytes, 0});
            }
        } else if (say == Say::kWelcome && decode(frame, welcome) &&
                   welcome.num_ranges == ranges.size()) {
            return {RangeTable(std::move(ranges)), welcome.chunk_bits};
        } else if (say == Say::kBye) {
            throw Error(Scope::kFenced,
                        label_ + " closed the target of generation " +
                            std::to_string(descriptor_.generation) + "; use the next one",
                        {{"peer", label_}});
        } else {
            throw Error(Scope::kConfig, label_ + " speaks another version of weightsync");
        }
    }
}

std::vector<UniqueFd> TcpRemote::dial_path(std::size_t path, std::uint32_t attempt,
                                           const net::Patience& patience) {
    net::Hello wanted = hello(net::LinkKind::kData);
    wanted.path = static_cast<std::uint16_t>(path);
    wanted.attempt = attempt;
    std::vector<UniqueFd> sockets;
    for (int stream = 0; stream < shared_.num_streams; ++stream) {
        wanted.stream = static_cast<std::uint16_t>(stream);
        sockets.push_back(net::dial(endpoints_[path % endpoints_.size()],
                                    paths_[path]->rail().local, wanted, descriptor_.key, label_,
                                    patience));
    }
    return sockets;
}

void TcpRemote::use_control(std::unique_ptr<net::Channel> channel) {
    const std::shared_ptr<net::Channel> shared_channel = std::move(channel);
    std::uint64_t old_watch = 0;
    std::shared_ptr<net::Channel> old;
    {
        const std::lock_guard lock(control_mutex_);
        if (is_closed_) {
            return;
        }
        old = std::exchange(control_, shared_channel);
        old_watch = std::exchange(control_watch_,
                                  shared_.reactor.watch(shared_channel->socket(), kStreamEvents,
                                                        [this, shared_channel](std::uint32_t) {
                                                            on_control(shared_channel);
                                                            return false;
                                                        }));
    }
    shared_.reactor.unwatch(old_watch);
    num_unanswered_ = 0;
    // What came together with the welcome has been read and rings no bell; and paths that failed
    // meanwhile are still to be fenced.
    for (std::size_t i = 0; i < paths_.size(); ++i) {
        if (paths_[i]->state() == PathState::kFencing) {
            notes_[i].has_failed = true;
        }
    }
    event_.signal();
}

void TcpRemote::notify(std::span<const std::int32_t> /*immediates*/) {
    throw Error(Scope::kConfig, "nothing of " + label_ + " is mapped here");
}

void TcpRemote::on_path_failed(std::size_t path) noexcept {
    notes_[path].has_failed = true;
    event_.signal();
}

void TcpRemote::on_path_stalled(std::size_t path) noexcept {
    notes_[path].is_stalled = true;
    event_.signal();
}

void TcpRemote::on_event() {
    std::shared_ptr<net::Channel> control;
    {
        const std::lock_guard lock(control_mutex_);
        control = control_;
    }
    if (!control) {
        return;  // the worker connects; it rings again
    }
    for (std::size_t i = 0; i < paths_.size(); ++i) {
        const PathAttempt which{static_cast<std::uint32_t>(i), paths_[i]->attempt()};
        if (notes_[i].has_failed.exchange(false)) {
            control->send(static_cast<std::uint8_t>(Say::kFence), net::bytes_of(which));
        }
        if (notes_[i].is_stalled.exchange(false)) {
            control->send(static_cast<std::uint8_t>(Say::kPing), net::bytes_of(which));
            if (++num_unanswered_ == kMaxUnanswered) {
                want_redial();  // perhaps it is the control connection's rail that is dead
            }
        }
    }
    on_control(control);
}

void TcpRemote::on_control(const std::shared_ptr<net::Channel>& channel) {
    bool is_open = channel->flush();
    is_open = channel->receive([this](const net::Frame& frame) { on_frame(frame); }) && is_open;
    if (is_open) {
        return;
    }
    std::uint64_t watch = 0;
    {
        const std::lock_guard lock(control_mutex_);
        if (control_ != channel) {
            return;
        }
        control_ = nullptr;
        watch = std::exchange(control_watch_, 0);
    }
    shared_.reactor.unwatch(watch);
    want_redial();
}

void TcpRemote::on_frame(const net::Frame& frame) {
    PathAttempt which;
    switch (static_cast<Say>(frame.type)) {
        case Say::kBye:
            end(Error(
                Scope::kFenced,
                label_ + " fenced or closed its target of generation " +
                    std::to_string(info_->generation) + "; connect to its next one",
                {{"peer", label_}, {"generation", static_cast<std::int64_t>(info_->generation)}}));
            return;
        case Say::kFenced:
            if (decode(frame, which) && which.path < paths_.size()) {
                on_fenced(which);
            }
            return;
        case Say::kPong:
            if (decode(frame, which) && which.path < paths_.size()) {
                num_unanswered_ = 0;
                paths_[which.path]->condemn(which.attempt);
            }
            return;
        default:
            return;  // of a later version
    }
}

void TcpRemote::on_fenced(PathAttempt which) {
    if (!paths_[which.path]->fenced(which.attempt)) {
        return;
    }
    const bool is_last = std::ranges::none_of(paths_, [](const auto& path) {
        return path->state() == PathState::kActive || path->state() == PathState::kProbing ||
               path->state() == PathState::kFencing;
    });
    if (is_last) {
        end(Error(Scope::kRail,
                  "no connection to " + label_ + " is left: all " + std::to_string(paths_.size()) +
                      " paths failed, while the peer still answers; are the NICs up?",
                  {{"peer", label_}}));
        return;
    }
    queue_->give_back(which.path);
    set_timer();
}

void TcpRemote::set_timer() {
    std::optional<PathHealth::Time> first;
    for (std::size_t i = 0; i < paths_.size(); ++i) {
        if (paths_[i]->state() == PathState::kQuarantined && !notes_[i].is_probing) {
            const PathHealth::Time time = paths_[i]->probe_time();
            first = first ? std::min(*first, time) : time;
        }
    }
    if (first) {
        timer_.set(*first - now());
    }
}

void TcpRemote::on_timer() {
    if (is_ended_) {
        return;
    }
    for (std::size_t i = 0; i < paths_.size(); ++i) {
        if (paths_[i]->state() == PathState::kQuarantined && paths_[i]->probe_time() <= now() &&
            !notes_[i].is_probing.exchange(true)) {
            shared_.worker.submit(this, [this, i] { probe(i); });
        }
    }
    set_timer();
}

void TcpRemote::probe(std::size_t path) noexcept {
    const net::Patience patience{Deadline::after(std::chrono::duration<double>(kDialTime).count()),
                                 &is_closed_};
    try {
        const std::uint32_t attempt = paths_[path]->begin_probe();
        paths_[path]->attach(dial_path(path, attempt, patience), true);
    } catch (const Error&) {
        paths_[path]->probe_failed();  // its state says so
    }
    notes_[path].is_probing = false;
    set_timer();
}

void TcpRemote::want_redial() {
    if (!is_ended_ && !is_redialling_.exchange(true)) {
        shared_.worker.submit(this, [this] { redial(); });
    }
}

void TcpRemote::redial() noexcept {
    const net::Patience patience{Deadline::after(std::chrono::duration<double>(kDialTime).count()),
                                 &is_closed_};
    try {
        auto control = dial_control(patience, true);
        [[maybe_unused]] const auto same = receive_welcome(*control, patience);
        is_redialling_ = false;
        use_control(std::move(control));
        return;
    } catch (const Error& error) {
        is_redialling_ = false;
        bool has_control = false;
        {
            const std::lock_guard lock(control_mutex_);
            has_control = control_ != nullptr;
        }
        if (has_control) {
            num_unanswered_ = 0;  // frozen, or cut off: deadlines decide how long that may last
        } else {
            end(error.scope() == Scope::kFenced ? error : gone_error());
        }
    }
}

Error TcpRemote::closed_error() const {
    return Error(Scope::kTransfer,
                 "the remote to " + label_ + " was closed while an operation was in flight",
                 Facts{{"peer", label_}});
}

Error TcpRemote::gone_error() const {
    return Error(Scope::kPeer,
                 label_ +
                     " is gone: it hung up and does not listen any more; plan again without "
                     "it",
                 Facts{{"peer", label_}});
}

void TcpRemote::end(const Error& error) noexcept {
    const std::lock_guard lock(end_mutex_);
    if (is_ended_.exchange(true)) {
        return;
    }
    timer_.clear();
    for (const auto& path : paths_) {
        path->shut();
    }
    // The kernel has copied all that it was given: no source is read from here on.
    queue_->fail(error);
    for (std::size_t i = 0; i < paths_.size(); ++i) {
        queue_->give_back(i);
    }
}

void TcpRemote::close() noexcept {
    is_closed_ = true;
    shared_.worker.cancel(this);
    shared_.reactor.unwatch(std::exchange(event_watch_, 0));
    shared_.reactor.unwatch(std::exchange(timer_watch_, 0));
    std::shared_ptr<net::Channel> control;
    std::uint64_t watch = 0;
    {
        const std::lock_guard lock(control_mutex_);
        control.swap(control_);
        watch = std::exchange(control_watch_, 0);
    }
    shared_.reactor.unwatch(watch);
    shared_.reactor.quiesce();
    shared_.worker.cancel(this);  // what the last handler may have begun
    if (queue_) {
        end(closed_error());
    }
}

void TcpRemote::add_to(const Rail& rail, RailInfo& info) const {
    for (std::size_t i = 0; i < paths_.size(); ++i) {
        if (&paths_[i]->rail() != &rail) {
            continue;
        }
        info.outstanding += queue_->outstanding_bytes(i);
        info.state =
            worse_state(info.state, kPathStateNames[static_cast<std::size_t>(paths_[i]->state())]);
    }
}

}  // namespace weightsync::tcp
