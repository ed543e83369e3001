#include "target.hpp"

#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include <weightsync/error.hpp>

namespace weightsync::tcp {

TcpTarget::TcpTarget(EngineContext& context, net::Listener& listener, net::Reactor& reactor,
                     std::vector<std::unique_ptr<Rail>>& rails, TargetSpec spec)
    : context_(context),
      listener_(listener),
      reactor_(reactor),
      rails_(rails),
      spec_(std::move(spec)),
      board_(spec_.make_board(context.progress.event.get())) {
    descriptor_.pid = static_cast<std::uint32_t>(::getpid());
    descriptor_.target_id = listener_.next_target_id();
    descriptor_.generation = spec_.generation;
    descriptor_.key = net::make_key();
    for (const net::Address& endpoint : listener_.endpoints()) {
        descriptor_.endpoints.emplace_back(endpoint.host(), endpoint.port());
    }
}

TcpTarget::~TcpTarget() {
    close();
}

void TcpTarget::start() {
    listener_.serve(descriptor_.target_id, descriptor_.key, descriptor_.generation,
                    [this](net::Accepted accepted) { accept(std::move(accepted)); });
}

void TcpTarget::accept(net::Accepted accepted) {
    if (accepted.hello.kind == net::LinkKind::kControl) {
        accept_control(std::move(accepted));
    } else {
        accept_data(std::move(accepted));
    }
}

void TcpTarget::accept_control(net::Accepted accepted) {
    const std::uint64_t id = accepted.hello.session;
    auto channel = std::make_shared<net::Channel>(std::move(accepted.socket));
    if (!send_welcome(*channel)) {
        throw Error(Scope::kPeer, "the source hung up");
    }
    std::shared_ptr<net::Channel> old;
    std::uint64_t old_watch = 0;
    {
        const std::lock_guard lock(mutex_);
        if (!is_accepting_) {
            throw Error(Scope::kFenced, "the target was fenced or closed");
        }
        Session& session = sessions_[id];
        old = std::exchange(session.control, channel);
        old_watch = std::exchange(
            session.control_watch,
            reactor_.watch(channel->socket(), kStreamEvents, [this, id, channel](std::uint32_t) {
                on_control(id, channel);
                return false;
            }));
    }
    reactor_.unwatch(old_watch);
}

bool TcpTarget::send_welcome(net::Channel& channel) const {
    constexpr std::size_t kPerFrame = net::kMaxFrameBytes / sizeof(Range64);
    std::vector<Range64> ranges;
    for (const Range& range : spec_.ranges.ranges()) {
        ranges.push_back({range.arena_offset, range.nbytes});
    }
    bool is_open = true;
    for (std::size_t at = 0; at < ranges.size() && is_open; at += kPerFrame) {
        const auto some = std::span(ranges).subspan(at, std::min(kPerFrame, ranges.size() - at));
        is_open = channel.send(static_cast<std::uint8_t>(Say::kRanges), std::as_bytes(some));
    }
    Welcome welcome;
    welcome.num_ranges = ranges.size();
    welcome.chunk_bits = spec_.slots->chunk_bits();
    return is_open &&
           channel.send(static_cast<std::uint8_t>(Say::kWelcome), net::bytes_of(welcome));
}

void TcpTarget::accept_data(net::Accepted accepted) {
    const net::Hello& hello = accepted.hello;
    Rail& rail = *rails_[accepted.endpoint];
    const auto stream =
        std::make_shared<SinkStream>(std::move(accepted.socket), rail, spec_.ranges, board_);
    stream->path = hello.path;
    stream->attempt = hello.attempt;
    const std::uint64_t id = hello.session;
    const std::lock_guard lock(mutex_);
    const auto found = sessions_.find(id);
    if (!is_accepting_ || found == sessions_.end()) {
        throw Error(Scope::kFenced, "no such session");
    }
    Session& session = found->second;
    const auto allowed = session.first_allowed.find(stream->path);
    if (allowed != session.first_allowed.end() && stream->attempt < allowed->second) {
        throw Error(Scope::kFenced, "this attempt of the path was fenced");
    }
    stream->watch =
        rail.reactor.watch(stream->socket(), kStreamEvents,
                           [this, id, stream](std::uint32_t) { return on_stream(id, stream); });
    session.streams.push_back(stream);
}

// On the rail's thread. Whoever takes the stream away waits until this has returned.
bool TcpTarget::on_stream(std::uint64_t session, const Stream& stream) {
    const SinkStream::State state = stream->advance();
    if (state != SinkStream::State::kOver) {
        return state == SinkStream::State::kMore;
    }
    // The lock first: the one who let it in may not be done with it.
    const std::lock_guard lock(mutex_);
    stream->rail().reactor.unwatch(stream->watch);  // from its own handler: waits for nobody
    if (const auto found = sessions_.find(session); found != sessions_.end()) {
        std::erase(found->second.streams, stream);
        forget_if_empty(found);
    }
    return false;
}

void TcpTarget::on_control(std::uint64_t session, const std::shared_ptr<net::Channel>& channel) {
    bool is_open = channel->flush();
    is_open = channel->receive([&](const net::Frame& frame) {
        on_frame(session, *channel, frame);
    }) && is_open;
    if (is_open) {
        return;
    }
    std::uint64_t watch = 0;
    {
        const std::lock_guard lock(mutex_);
        const auto found = sessions_.find(session);
        if (found == sessions_.end() || found->second.control != channel) {
            return;
        }
        // Its data connections go when they break: the source may come back by another rail.
        found->second.control = nullptr;
        watch = std::exchange(found->second.control_watch, 0);
        forget_if_empty(found);
    }
    reactor_.unwatch(watch);
}

void TcpTarget::forget_if_empty(Sessions::iterator session) {
    if (!session->second.control && session->second.streams.empty()) {
        sessions_.erase(session);
    }
}

void TcpTarget::on_frame(std::uint64_t session, net::Channel& channel, const net::Frame& frame) {
    PathAttempt which;
    if (frame.payload.size() != sizeof(which)) {
        return;
    }
    std::memcpy(&which, frame.payload.data(), sizeof(which));
    if (frame.type == static_cast<std::uint8_t>(Say::kFence)) {
        fence_path(session, which);
        channel.send(static_cast<std::uint8_t>(Say::kFenced), net::bytes_of(which));
    } else if (frame.type == static_cast<std::uint8_t>(Say::kPing)) {
        channel.send(static_cast<std::uint8_t>(Say::kPong), net::bytes_of(which));
    }
}

void TcpTarget::fence_path(std::uint64_t session, PathAttempt which) {
    std::vector<Stream> gone;
    {
        const std::lock_guard lock(mutex_);
        const auto found = sessions_.find(session);
        if (found == sessions_.end() || which.path >= kMaxRails) {
            return;
        }
        found->second.first_allowed[which.path] = which.attempt + 1;
        auto& streams = found->second.streams;
        const auto is_meant = [&](const Stream& stream) {
            return stream->path == which.path && stream->attempt <= which.attempt;
        };
        std::ranges::copy_if(streams, std::back_inserter(gone), is_meant);
        std::erase_if(streams, is_meant);
    }
    for (const Stream& stream : gone) {
        stream->rail().reactor.unwatch(stream->watch);
    }
}

void TcpTarget::drop_all() noexcept {
    {
        const std::lock_guard lock(mutex_);
        is_accepting_ = false;
    }
    listener_.stop_serving(descriptor_.target_id);
    Sessions sessions;
    {
        const std::lock_guard lock(mutex_);
        sessions.swap(sessions_);
    }
    // First the reason, on a connection of its own: data connections only break.
    for (auto& [id, session] : sessions) {
        if (session.control) {
            session.control->send(static_cast<std::uint8_t>(Say::kBye));
        }
    }
    for (auto& [id, session] : sessions) {
        for (const Stream& stream : session.streams) {
            stream->rail().reactor.unwatch(stream->watch);
        }
        reactor_.unwatch(session.control_watch);
        if (session.control) {
            session.control->shut();
        }
    }
    // Those that had just taken themselves out of the sessions.
    for (const auto& rail : rails_) {
        rail->reactor.quiesce();
    }
    reactor_.quiesce();
}

void TcpTarget::fence(bool /*discard*/) {
    board_.close();
    drop_all();
}

void TcpTarget::close() noexcept {
    drop_all();
}

}  // namespace weightsync::tcp
