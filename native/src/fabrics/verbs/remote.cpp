#include "remote.hpp"

#include <sys/epoll.h>

#include <algorithm>
#include <thread>

namespace weightsync::verbs {

namespace {

constexpr std::size_t kMaxPaths = 256;
constexpr std::uint32_t kMaxRanges = 1U << 20;
// Small enough to spread a long row over rails, large enough to cost no rate.
constexpr std::uint64_t kMaxPieceBytes = std::uint64_t{1} << 20;
// How long close() lets writes that were posted come through.
constexpr std::chrono::seconds kCloseTime{1};

std::uint8_t code(Type type) noexcept {
    return static_cast<std::uint8_t>(type);
}

}  // namespace

VerbsRemote::VerbsRemote(net::Reactor& reactor, const Rails& rails, UniqueFd channel,
                         std::string label, std::uint64_t generation)
    : reactor_(reactor), rails_(rails), channel_(std::move(channel)) {
    info_->peer = std::move(label);
    info_->generation = generation;
}

void VerbsRemote::connect(std::shared_ptr<const LocalMemory> memory,
                          const net::Patience& patience) {
    read_welcome(patience);
    make_paths(std::move(memory));
    for (std::size_t i = 0; i < paths_.size(); ++i) {
        ask_to_open(i);
    }
    const auto is_opening = [](const Path& path) { return path.is_opening; };
    while (std::ranges::any_of(paths_, is_opening)) {
        on_frame(channel_.next(patience, info_->peer));
        if (is_fenced_) {
            throw Error(Scope::kFenced, info_->peer + " fenced its target while we connected",
                        {{"peer", info_->peer}});
        }
    }
    if (std::ranges::none_of(paths_, [](const Path& path) { return path.health.is_usable(); })) {
        throw refusal_ ? *refusal_
                       : Error(Scope::kRail, "no path to " + info_->peer + " could be opened");
    }
    watch();
}

void VerbsRemote::read_welcome(const net::Patience& patience) {
    const auto next = [&](Type wanted) {
        net::Frame frame = channel_.next(patience, info_->peer);
        if (frame.type == code(Type::kGone)) {
            throw Error(Scope::kFenced, info_->peer + " fenced its target while we connected",
                        {{"peer", info_->peer}});
        }
        if (frame.type != code(wanted)) {
            throw Error(Scope::kTransfer, info_->peer + " sent an unexpected message");
        }
        return frame;
    };
    const Welcome welcome = decode_welcome(next(Type::kWelcome).payload);
    if (welcome.num_rails == 0 || welcome.num_rails > kMaxPaths ||
        welcome.num_ranges > kMaxRanges || welcome.max_message_bytes == 0) {
        throw Error(Scope::kTransfer, info_->peer + " describes itself impossibly");
    }
    std::vector<RemoteRange> ranges;
    while (ranges.size() < welcome.num_ranges) {
        const net::Frame frame = next(Type::kRanges);
        ByteReader reader(frame.payload);
        while (!reader.rest().empty() && ranges.size() < welcome.num_ranges) {
            ranges.push_back(get_range(reader, welcome.num_rails));
        }
        reader.expect_end();
    }
    std::ranges::sort(ranges, {}, [](const RemoteRange& one) { return one.range.arena_offset; });
    std::vector<Range> table;
    for (const RemoteRange& one : ranges) {
        table.push_back(one.range);
        outbox_->rkeys.insert(outbox_->rkeys.end(), one.rkeys.begin(), one.rkeys.end());
    }
    info_->chunk_bits = welcome.chunk_bits;
    info_->ranges = RangeTable(table);
    outbox_->ranges = RangeTable(std::move(table));
    outbox_->num_sink_rails = welcome.num_rails;
    std::uint64_t limit = std::min<std::uint64_t>(kMaxPieceBytes, welcome.max_message_bytes);
    for (const auto& rail : rails_) {
        limit = std::min<std::uint64_t>(limit, rail->port().attr.max_msg_sz);
    }
    const std::size_t num_paths = std::max<std::size_t>(rails_.size(), welcome.num_rails);
    paths_.resize(num_paths);
    outbox_->has_work = std::make_unique<std::atomic<bool>[]>(num_paths);
    outbox_->queue = std::make_unique<SendQueue>(
        num_paths, std::max<std::uint64_t>(limit, 1),
        [has_work = outbox_->has_work.get(), &rails = rails_](std::size_t path) {
            has_work[path].store(true);
            rails[path % rails.size()]->wake();
        });
}

// As many paths as the side with more rails has: rail i meets rail i, and those that one side has
// too few of are used several times.
void VerbsRemote::make_paths(std::shared_ptr<const LocalMemory> memory) {
    outbox_->memory = std::move(memory);
    for (std::size_t i = 0; i < paths_.size(); ++i) {
        paths_[i].rail = i % rails_.size();
        paths_[i].sink_rail = static_cast<std::uint16_t>(i % outbox_->num_sink_rails);
    }
}

void VerbsRemote::ask_to_open(std::size_t index) {
    Path& path = paths_[index];
    Rail& rail = rail_of(path);
    path.attempt = path.health.attempt();
    const PathName name{static_cast<std::uint16_t>(index), path.sink_rail, path.attempt};
    const auto weak = weak_from_this();
    path.sender = std::make_shared<Sender>(
        rail, path.rail, outbox_, name, rail.name() + " to " + info_->peer,
        [weak, index, attempt = path.attempt](const Error& error) {
            if (const auto self = weak.lock()) {
                self->tell(index, attempt, error);
            }
        },
        [weak, index, attempt = path.attempt] {
            if (const auto self = weak.lock()) {
                self->tell(index, attempt, std::nullopt);
            }
        });
    PathEnd end;
    rail.call([&] { end = path.sender->open(path.sender); });
    path.is_opening = true;
    channel_.send(code(Type::kOpen), encode(end));
}

void VerbsRemote::tell(std::size_t path, std::uint32_t attempt, std::optional<Error> error) {
    {
        const std::lock_guard lock(mutex_);
        notices_.push_back({path, attempt, std::move(error)});
    }
    notice_event_.signal();
}

void VerbsRemote::watch() {
    is_connected_ = true;
    set_timer();
    const auto add = [&](int fd, std::uint32_t events, auto handler) {
        const std::uint64_t watch =
            reactor_.watch(fd, events, [weak = weak_from_this(), handler](std::uint32_t) {
                if (const auto self = weak.lock()) {
                    handler(*self);
                }
                return false;
            });
        const std::lock_guard lock(mutex_);
        watches_.push_back(watch);
    };
    add(notice_event_.get(), EPOLLIN, [](VerbsRemote& self) { self.on_notices(); });
    add(timer_.get(), EPOLLIN, [](VerbsRemote& self) { self.on_timer(); });
    add(channel_.socket(), EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, [](VerbsRemote& self) {
        if (!self.on_frames()) {
            self.unwatch();
        }
    });
}

// False when the peer is gone and everything has ended.
bool VerbsRemote::on_frames() {
    bool is_open = false;
    try {
        is_open = channel_.flush() &&
                  channel_.receive([this](const net::Frame& frame) { on_frame(frame); });
    } catch (const std::exception& error) {
        report("verbs fabric: " + info_->peer + ": " + error.what());
    }
    if (is_open && !is_fenced_) {
        return true;
    }
    Facts facts{{"peer", info_->peer},
                {"generation", static_cast<std::int64_t>(info_->generation)}};
    if (is_fenced_) {
        end(Error(Scope::kFenced,
                  info_->peer + " fenced or closed its target of generation " +
                      std::to_string(info_->generation) + "; connect to its next one",
                  std::move(facts)));
    } else {
        end(Error(Scope::kPeer, info_->peer + " is gone; plan again without it", std::move(facts)));
    }
    return false;
}

void VerbsRemote::on_frame(const net::Frame& frame) {
    switch (static_cast<Type>(frame.type)) {
        case Type::kOpened:
            on_opened(decode_end(frame.payload));
            return;
        case Type::kRefused:
            on_refused(frame);
            return;
        case Type::kFenced:
            on_fenced(decode_name(frame.payload));
            return;
        case Type::kGone:
            is_fenced_ = true;
            return;
        case Type::kFailed:
            on_failed(decode_name(frame.payload));
            return;
        case Type::kWelcome:
        case Type::kRanges:
        case Type::kOpen:
        case Type::kFence:
            break;
    }
    throw Error(Scope::kTransfer, "unexpected message " + std::to_string(frame.type));
}

void VerbsRemote::on_opened(const PathEnd& end) {
    if (end.name.path >= paths_.size()) {
        throw Error(Scope::kTransfer, "there is no path " + std::to_string(end.name.path));
    }
    Path& path = paths_[end.name.path];
    if (!path.is_opening || path.attempt != end.name.attempt) {
        return;
    }
    path.is_opening = false;
    const bool is_probe = path.health.state() == PathState::kQuarantined;
    if (!path.sender->is_open()) {
        on_path_failure(end.name.path, Error(Scope::kRail, "the port went down"));
        return;
    }
    try {
        rail_of(path).call([&] { path.sender->start(end, is_probe); });
    } catch (const Error& error) {
        refusal_ = error;
        on_path_failure(end.name.path, error);
        return;
    }
    {
        const std::lock_guard lock(mutex_);
        path.health.probing();
    }
    rail_of(path).wake();
}

void VerbsRemote::on_refused(const net::Frame& frame) {
    ByteReader reader(frame.payload);
    const PathName name = get_name(reader);
    const auto scope = reader.get<std::uint8_t>();
    const std::string text(reinterpret_cast<const char*>(reader.rest().data()),
                           reader.rest().size());
    if (name.path >= paths_.size()) {
        throw Error(Scope::kTransfer, "there is no path " + std::to_string(name.path));
    }
    Path& path = paths_[name.path];
    if (!path.is_opening || path.attempt != name.attempt) {
        return;
    }
    path.is_opening = false;
    refusal_ = Error(scope < kNumScopes ? static_cast<Scope>(scope) : Scope::kTransfer,
                     info_->peer + " refused a path: " + text, {{"peer", info_->peer}});
    on_path_failure(name.path, *refusal_);
}

// Of a path that is usable, or that could not be built.
void VerbsRemote::on_path_failure(std::size_t index, const Error& error) {
    Path& path = paths_[index];
    drop_sender(path);
    outbox_->queue->leave(index);
    bool was_usable = false;
    {
        const std::lock_guard lock(mutex_);
        was_usable = path.health.fail(Clock::now());
        if (!was_usable) {
            path.health.probe_failed(Clock::now());
        }
    }
    if (was_usable) {
        const PathName name{static_cast<std::uint16_t>(index), path.sink_rail, path.attempt};
        channel_.send(code(Type::kFence), encode(name));
        const bool is_last =
            std::ranges::none_of(paths_, [](const Path& one) { return one.health.is_usable(); });
        if (is_last && is_connected_) {
            end(Error(
                Scope::kRail,
                "no rail to " + info_->peer + " works any more; the last one: " + error.detail(),
                {{"peer", info_->peer}}));
            unwatch();
            return;
        }
    }
    set_timer();
}

void VerbsRemote::on_fenced(const PathName& name) {
    if (name.path >= paths_.size() || paths_[name.path].attempt != name.attempt) {
        return;
    }
    Path& path = paths_[name.path];
    if (path.health.state() != PathState::kFencing) {
        return;
    }
    outbox_->queue->give_back(name.path);
    {
        const std::lock_guard lock(mutex_);
        path.health.fenced(Clock::now());
    }
    set_timer();
}

void VerbsRemote::on_failed(const PathName& name) {
    if (is_over_ || name.path >= paths_.size() || paths_[name.path].attempt != name.attempt ||
        (!paths_[name.path].is_opening && !paths_[name.path].health.is_usable())) {
        return;
    }
    on_path_failure(name.path, Error(Scope::kRail,
                                     info_->peer + ": its end of the path failed, or its port "
                                                   "went down",
                                     {{"peer", info_->peer}}));
}

void VerbsRemote::on_notices() {
    notice_event_.drain();
    std::vector<Notice> notices;
    {
        const std::lock_guard lock(mutex_);
        notices.swap(notices_);
    }
    for (const Notice& notice : notices) {
        Path& path = paths_[notice.path];
        if (is_over_ || path.attempt != notice.attempt) {
            continue;
        }
        if (notice.error) {
            path.is_opening = false;
            on_path_failure(notice.path, *notice.error);
        } else {
            const std::lock_guard lock(mutex_);
            path.health.succeeded(Clock::now());
        }
    }
}

void VerbsRemote::on_timer() {
    timer_.drain();
    if (is_over_) {
        return;
    }
    const auto now = Clock::now();
    for (std::size_t i = 0; i < paths_.size(); ++i) {
        Path& path = paths_[i];
        if (path.health.state() != PathState::kQuarantined || path.is_opening ||
            path.health.probe_time() > now) {
            continue;
        }
        try {
            if (!rail_of(path).is_up()) {
                throw Error(Scope::kRail, "the port is down");
            }
            {
                const std::lock_guard lock(mutex_);
                path.health.begin_probe();
            }
            ask_to_open(i);
        } catch (const Error&) {
            drop_sender(path);
            const std::lock_guard lock(mutex_);
            path.health.probe_failed(now);  // the next one comes later
        }
    }
    set_timer();
}

void VerbsRemote::set_timer() {
    auto next = Clock::time_point::max();
    for (const Path& path : paths_) {
        if (path.health.state() == PathState::kQuarantined && !path.is_opening) {
            next = std::min(next, path.health.probe_time());
        }
    }
    if (next != Clock::time_point::max()) {
        timer_.set(std::max(next - Clock::now(), Clock::duration(1)));
    }
}

void VerbsRemote::drop_sender(Path& path) noexcept {
    path.is_opening = false;
    if (const std::shared_ptr<Sender> sender = std::move(path.sender)) {
        rail_of(path).call([&] { sender->close(); });
    }
    path.sender.reset();
}

void VerbsRemote::end(const Error& error) noexcept {
    {
        const std::lock_guard lock(mutex_);
        if (is_over_) {
            return;
        }
        is_over_ = true;
    }
    if (!outbox_->queue) {
        return;  // not even connected
    }
    outbox_->queue->fail(error);
    for (std::size_t i = 0; i < paths_.size(); ++i) {
        drop_sender(paths_[i]);
        outbox_->queue->give_back(i);
    }
}

void VerbsRemote::unwatch() noexcept {
    std::vector<std::uint64_t> watches;
    {
        const std::lock_guard lock(mutex_);
        watches = watches_;
    }
    for (const std::uint64_t watch : watches) {
        reactor_.unwatch(watch);
    }
}

void VerbsRemote::post(std::shared_ptr<Operation> operation) {
    outbox_->queue->push(std::move(operation));
}

void VerbsRemote::notify(std::span<const std::int32_t> /*immediates*/) {
    throw Error(Scope::kInternal, "verbs maps no memory of the peer");
}

void VerbsRemote::wait_for_outstanding() noexcept {
    const auto until = Clock::now() + kCloseTime;
    const auto is_quiet = [this] {
        for (std::size_t i = 0; i < paths_.size(); ++i) {
            if (outbox_->queue->outstanding_bytes(i) != 0) {
                return false;
            }
        }
        return true;
    };
    while (!is_quiet() && Clock::now() < until) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

void VerbsRemote::close() noexcept {
    unwatch();  // from here on nothing else runs but the rails
    {
        const std::lock_guard lock(mutex_);
        if (is_over_) {
            return;
        }
    }
    const Error error(Scope::kTransfer,
                      "the remote to " + info_->peer +
                          " was closed while an operation was in "
                          "flight",
                      {{"peer", info_->peer}});
    if (outbox_->queue) {
        outbox_->queue->fail(error);  // what no rail has taken; the rest may come through
        wait_for_outstanding();
    }
    end(error);
    channel_.shut();
}

std::string_view VerbsRemote::state_of(std::size_t rail) const {
    const std::lock_guard lock(mutex_);
    std::string_view worst = "idle";
    for (const Path& path : paths_) {
        if (!is_over_ && path.rail == rail) {
            const auto state = static_cast<std::size_t>(path.health.state());
            worst = worse_state(worst, kPathStateNames[state]);
        }
    }
    return worst;
}

}  // namespace weightsync::verbs
