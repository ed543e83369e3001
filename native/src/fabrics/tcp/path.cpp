#include "path.hpp"

#include <sys/epoll.h>

#include <algorithm>
#include <array>
#include <utility>

namespace weightsync::tcp {

namespace {

constexpr int kTurnBlocks = 8;
constexpr std::chrono::milliseconds kTick{250};
// Longer than TCP takes to repair a lost segment.
constexpr std::chrono::seconds kStall{2};
constexpr std::uint64_t kProbeBytes = 64U << 10U;

}  // namespace

Path::Path(std::size_t number, Rail& rail, PathOwner& owner, SendQueue& queue,
           std::uint64_t window_bytes, std::uint64_t block_bytes)
    : number_(number),
      rail_(rail),
      owner_(owner),
      queue_(queue),
      window_bytes_(window_bytes),
      block_bytes_(block_bytes) {
    event_watch_ = rail_.reactor.watch(event_.get(), EPOLLIN, [this](std::uint32_t) {
        event_.drain();
        return on_wake();
    });
    timer_watch_ = rail_.reactor.watch(timer_.get(), EPOLLIN, [this](std::uint32_t) {
        timer_.drain();
        on_tick();
        return false;
    });
}

bool Path::attach(std::vector<UniqueFd> sockets, bool is_probe) {
    {
        const std::lock_guard lock(mutex_);
        if (is_shut_) {
            return false;
        }
        for (UniqueFd& socket : sockets) {
            auto stream = std::make_shared<SourceStream>(std::move(socket), rail_);
            stream->watch = rail_.reactor.watch(
                stream->socket(), kStreamEvents,
                [this, stream](std::uint32_t events) { return on_event(stream, events); });
            streams_.push_back(std::move(stream));
        }
        if (is_probe) {
            health_.probing();
        }
    }
    wake();
    return true;
}

void Path::shut() noexcept {
    std::vector<Stream> streams;
    {
        const std::lock_guard lock(mutex_);
        is_shut_ = true;
        streams.swap(streams_);
    }
    rail_.reactor.unwatch(std::exchange(event_watch_, 0));
    rail_.reactor.unwatch(std::exchange(timer_watch_, 0));
    for (const Stream& stream : streams) {
        rail_.reactor.unwatch(stream->watch);
    }
    rail_.reactor.quiesce();  // one that has just failed is in no list any more
}

bool Path::on_event(const Stream& stream, std::uint32_t events) {
    const std::lock_guard lock(mutex_);
    if (is_shut_ || std::ranges::find(streams_, stream) == streams_.end()) {
        return false;
    }
    if ((events & EPOLLOUT) != 0) {
        stream->unblock();
    }
    if (!take_acks(*stream)) {
        fail();
        return false;
    }
    return pump();
}

bool Path::on_wake() {
    const std::lock_guard lock(mutex_);
    if (is_shut_) {
        return false;
    }
    if (std::exchange(is_condemned_, false) && is_ticking_ && num_moved() == moved_at_tick_) {
        fail();
        return false;
    }
    return pump();
}

bool Path::take_acks(SourceStream& stream) {
    const bool is_open = stream.receive_acks();
    if (!stream.acked().empty()) {
        queue_.complete(number_, stream.acked());
        health_.succeeded(now());
    }
    return is_open;
}

// Sends until the queue is empty or nobody takes more; true when it stopped to give others a turn.
bool Path::pump() {
    for (int turn = 0; turn < kTurnBlocks; ++turn) {
        SourceStream* best = nullptr;
        for (const Stream& stream : streams_) {
            if (stream->has_rest()) {
                best = stream.get();
                break;
            }
            if (stream->has_room() &&
                (best == nullptr || stream->outstanding_bytes() < best->outstanding_bytes())) {
                best = stream.get();
            }
        }
        if (best == nullptr) {
            return false;
        }
        if (!best->has_rest()) {
            const std::uint64_t held = queue_.outstanding_bytes(number_);
            const bool is_probing = health_.state() == PathState::kProbing;
            if (!health_.is_usable() || held >= window_bytes_ || (is_probing && held != 0)) {
                return false;
            }
            std::array<Piece, kMaxBlockWrites> pieces;
            const std::uint64_t max_bytes = std::min(window_bytes_ - held, block_bytes_);
            const std::span room(pieces.data(), is_probing ? 1 : pieces.size());
            const std::size_t count =
                queue_.take(number_, is_probing ? kProbeBytes : max_bytes, room);
            if (count == 0) {
                return false;
            }
            best->begin(room.first(count));
            if (!is_ticking_) {
                is_ticking_ = true;
                moved_time_ = now();
                moved_at_tick_ = num_moved();
                timer_.set(kTick);
            }
        }
        if (!best->send()) {
            fail();
            return false;
        }
    }
    return true;
}

std::uint64_t Path::num_moved() const noexcept {
    std::uint64_t total = 0;
    for (const Stream& stream : streams_) {
        total += stream->num_moved();
    }
    return total;
}

void Path::on_tick() {
    const std::lock_guard lock(mutex_);
    if (is_shut_ || streams_.empty() || queue_.outstanding_bytes(number_) == 0) {
        is_ticking_ = false;  // an idle path costs nothing
        return;
    }
    const std::uint64_t moved = num_moved();
    if (moved != moved_at_tick_) {
        moved_at_tick_ = moved;
        moved_time_ = now();
        is_condemned_ = false;
    } else if (now() - moved_time_ > kStall) {
        owner_.on_path_stalled(number_);
    }
    timer_.set(kTick);
}

// What was taken stays with this path until the sink has confirmed that nothing of it can land.
void Path::fail() noexcept {
    if (!health_.fail(now())) {
        return;
    }
    for (const Stream& stream : streams_) {
        rail_.reactor.unwatch(stream->watch);
    }
    streams_.clear();
    timer_.clear();
    is_ticking_ = false;
    is_condemned_ = false;
    queue_.leave(number_);
    owner_.on_path_failed(number_);
}

PathState Path::state() const {
    const std::lock_guard lock(mutex_);
    return health_.state();
}

PathHealth::Time Path::probe_time() const {
    const std::lock_guard lock(mutex_);
    return health_.probe_time();
}

std::uint32_t Path::attempt() const {
    const std::lock_guard lock(mutex_);
    return health_.attempt();
}

std::uint32_t Path::begin_probe() {
    const std::lock_guard lock(mutex_);
    return health_.begin_probe();
}

void Path::probe_failed() {
    const std::lock_guard lock(mutex_);
    health_.probe_failed(now());
}

void Path::quarantine() {
    const std::lock_guard lock(mutex_);
    if (health_.fail(now())) {
        health_.fenced(now());
    }
}

bool Path::fenced(std::uint32_t attempt) {
    const std::lock_guard lock(mutex_);
    if (health_.state() != PathState::kFencing || attempt != health_.attempt()) {
        return false;
    }
    health_.fenced(now());
    return true;
}

void Path::condemn(std::uint32_t attempt) noexcept {
    {
        const std::lock_guard lock(mutex_);
        is_condemned_ =
            health_.is_usable() && attempt == health_.attempt() && now() - moved_time_ > kStall;
    }
    wake();
}

}  // namespace weightsync::tcp
