#include "target.hpp"

#include <sys/epoll.h>

#include <algorithm>

namespace weightsync::verbs {

namespace {

constexpr std::size_t kMaxAddresses = 16;

std::span<const std::byte> text_bytes(const std::string& text) {
    return std::as_bytes(std::span(text));
}

}  // namespace

std::vector<std::byte> Descriptor::encode() const {
    ByteWriter writer;
    writer.put(target_id).put(generation).put(key);
    writer.put(static_cast<std::uint8_t>(addresses.size()));
    for (const auto& [host, port] : addresses) {
        writer.put_text(host).put(port);
    }
    return writer.take();
}

Descriptor Descriptor::decode(std::span<const std::byte> bytes) {
    ByteReader reader(bytes);
    Descriptor descriptor;
    descriptor.target_id = reader.get<std::uint64_t>();
    descriptor.generation = reader.get<std::uint64_t>();
    descriptor.key = reader.get<net::Key>();
    const auto count = reader.get<std::uint8_t>();
    if (count == 0 || count > kMaxAddresses) {
        throw Error(Scope::kConfig, "descriptor names no address; it is damaged");
    }
    for (std::uint8_t i = 0; i < count; ++i) {
        std::string host = reader.get_text();
        const auto port = reader.get<std::uint16_t>();
        descriptor.addresses.emplace_back(std::move(host), port);
    }
    reader.expect_end();
    return descriptor;
}

VerbsTarget::VerbsTarget(EngineContext& context, net::Reactor& reactor, net::Listener& listener,
                         const Rails& rails, TargetSpec spec)
    : context_(context),
      reactor_(reactor),
      listener_(listener),
      rails_(rails),
      spec_(std::move(spec)),
      board_(std::make_shared<Board>(spec_.make_board(context.progress.event.get()))) {
    descriptor_.target_id = listener_.next_target_id();
    descriptor_.generation = spec_.generation;
    descriptor_.key = net::make_key();
    for (const net::Address& address : listener_.endpoints()) {
        descriptor_.addresses.emplace_back(address.host(), address.port());
    }
    register_ranges();
}

// For writing only, and fresh for every export: an older one's keys open nothing.
void VerbsTarget::register_ranges() {
    for (const Range& range : spec_.ranges.ranges()) {
        if (!ranges_.empty()) {
            Range& last = ranges_.back().range;
            if (last.arena_offset + last.nbytes == range.arena_offset &&
                last.base + last.nbytes == range.base) {
                last.nbytes += range.nbytes;
                continue;
            }
        }
        ranges_.push_back({range, {}});
    }
    const cuda::Driver* gpu = rails_.front()->domain()->memory().gpu_driver();
    for (RemoteRange& range : ranges_) {
        if (gpu != nullptr) {
            flush_.add(*gpu, range.range.base);
        }
        for (const auto& rail : rails_) {
            registrations_.push_back(
                std::make_unique<Registration>(rail->domain(), range.range.base, range.range.nbytes,
                                               Registration::Access::kWriteRemotely));
            range.rkeys.push_back(registrations_.back()->rkey());
        }
    }
}

void VerbsTarget::serve() {
    listener_.serve(descriptor_.target_id, descriptor_.key, descriptor_.generation,
                    [weak = weak_from_this()](net::Accepted accepted) {
                        if (const auto self = weak.lock()) {
                            self->on_accept(std::move(accepted));
                        }
                    });
}

void VerbsTarget::welcome(net::Channel& channel) const {
    Welcome message;
    message.num_rails = static_cast<std::uint16_t>(rails_.size());
    message.chunk_bits = static_cast<std::uint16_t>(board_->slots().chunk_bits());
    message.num_ranges = static_cast<std::uint32_t>(ranges_.size());
    message.max_message_bytes = ~std::uint32_t{0};
    for (const auto& rail : rails_) {
        message.max_message_bytes =
            std::min(message.max_message_bytes, rail->port().attr.max_msg_sz);
    }
    bool is_sent = channel.send(static_cast<std::uint8_t>(Type::kWelcome), encode(message));
    const std::size_t per_frame = net::kMaxFrameBytes / range_bytes(rails_.size());
    for (std::size_t begin = 0; is_sent && begin < ranges_.size(); begin += per_frame) {
        ByteWriter writer;
        for (std::size_t i = begin; i < std::min(begin + per_frame, ranges_.size()); ++i) {
            put(writer, ranges_[i]);
        }
        is_sent = channel.send(static_cast<std::uint8_t>(Type::kRanges), writer.take());
    }
    if (!is_sent) {
        throw Error(Scope::kTransfer, "the source does not read what it is told");
    }
}

void VerbsTarget::on_accept(net::Accepted accepted) {
    if (accepted.hello.kind != net::LinkKind::kControl) {
        throw Error(Scope::kTransfer, "verbs has no data connections");
    }
    auto session = std::make_shared<Session>(std::move(accepted.socket));
    session->peer = std::move(accepted.peer);
    const std::lock_guard lock(mutex_);
    if (is_over_) {
        throw Error(Scope::kFenced, "the target was fenced or closed");
    }
    welcome(session->channel);
    const std::uint64_t id = next_session_++;
    session->watch = reactor_.watch(
        session->channel.socket(), EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET,
        [weak = weak_from_this(), watched = std::weak_ptr(session), id](std::uint32_t) {
            const auto self = weak.lock();
            const auto live = watched.lock();
            if (self && live && !self->on_event(*live)) {
                self->forget(id);
            }
            return false;
        });
    sessions_.emplace(id, std::move(session));
}

bool VerbsTarget::on_event(Session& session) {
    try {
        return session.channel.flush() &&
               session.channel.receive([&](const net::Frame& frame) { on_frame(session, frame); });
    } catch (const std::exception& error) {
        board_->header().protocol_errors.fetch_add(1, std::memory_order_relaxed);
        report("verbs fabric: source " + session.peer + ": " + error.what());
        return false;
    }
}

void VerbsTarget::on_frame(Session& session, const net::Frame& frame) {
    switch (static_cast<Type>(frame.type)) {
        case Type::kOpen:
            open_path(session, decode_end(frame.payload));
            return;
        case Type::kFence: {
            const PathName name = decode_name(frame.payload);
            // An attempt that is younger than the one that failed goes on.
            if (session.attempts[name.path] <= name.attempt) {
                close_path(session, name.path);
            }
            session.channel.send(static_cast<std::uint8_t>(Type::kFenced), encode(name));
            return;
        }
        case Type::kWelcome:
        case Type::kRanges:
        case Type::kOpened:
        case Type::kRefused:
        case Type::kFenced:
        case Type::kGone:
        case Type::kFailed:
            break;
    }
    throw Error(Scope::kTransfer, "unexpected message " + std::to_string(frame.type));
}

void VerbsTarget::open_path(Session& session, const PathEnd& source) {
    const PathName& name = source.name;
    try {
        if (name.sink_rail >= rails_.size()) {
            throw Error(Scope::kConfig, "there is no rail " + std::to_string(name.sink_rail));
        }
        close_path(session, name.path);
        Rail& rail = *rails_[name.sink_rail];
        if (!rail.is_up()) {
            throw Error(Scope::kRail, "the port " + rail.name() + " is down");
        }
        // The source might notice late or never: its own port is up.
        const auto tell = [weak = session.weak_from_this(), name] {
            if (const auto live = weak.lock()) {
                live->channel.send(static_cast<std::uint8_t>(Type::kFailed), encode(name));
            }
        };
        auto receiver = std::make_shared<Receiver>(rail, board_, name,
                                                   rail.name() + " from " + session.peer, tell);
        PathEnd end;
        rail.call([&] { end = receiver->open(receiver, source); });
        session.receivers[name.path] = std::move(receiver);
        session.attempts[name.path] = name.attempt;
        session.channel.send(static_cast<std::uint8_t>(Type::kOpened), encode(end));
    } catch (const Error& error) {
        ByteWriter writer;
        put(writer, name).put(static_cast<std::uint8_t>(error.scope()));
        writer.put_bytes(text_bytes(error.detail()));
        session.channel.send(static_cast<std::uint8_t>(Type::kRefused), writer.take());
    }
}

void VerbsTarget::close_path(Session& session, std::uint16_t path) noexcept {
    const auto found = session.receivers.find(path);
    if (found == session.receivers.end()) {
        return;
    }
    const std::shared_ptr<Receiver> receiver = std::move(found->second);
    session.receivers.erase(found);
    receiver->rail().call([&] { receiver->close(); });
}

void VerbsTarget::forget(std::uint64_t id) noexcept {
    std::shared_ptr<Session> session;
    {
        const std::lock_guard lock(mutex_);
        const auto found = sessions_.find(id);
        if (found == sessions_.end()) {
            return;
        }
        session = std::move(found->second);
        sessions_.erase(found);
    }
    reactor_.unwatch(session->watch);
    while (!session->receivers.empty()) {
        close_path(*session, session->receivers.begin()->first);
    }
}

void VerbsTarget::drop_sessions() noexcept {
    {
        // Once: the last owner may be a handler that outlives the listener.
        const std::lock_guard lock(mutex_);
        if (is_over_) {
            return;
        }
        is_over_ = true;
    }
    listener_.stop_serving(descriptor_.target_id);
    std::unordered_map<std::uint64_t, std::shared_ptr<Session>> sessions;
    {
        const std::lock_guard lock(mutex_);
        sessions.swap(sessions_);
    }
    for (auto& [id, session] : sessions) {
        reactor_.unwatch(session->watch);  // its handler does not run any more
        while (!session->receivers.empty()) {
            close_path(*session, session->receivers.begin()->first);
        }
        session->channel.send(static_cast<std::uint8_t>(Type::kGone));
        session->channel.shut();
    }
    // Whoever kept a key finds nothing behind it.
    registrations_.clear();
}

void VerbsTarget::fence(bool /*discard*/) {
    drop_sessions();
}

void VerbsTarget::close() noexcept {
    drop_sessions();
}

}  // namespace weightsync::verbs
