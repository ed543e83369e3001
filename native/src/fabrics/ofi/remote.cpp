#include "remote.hpp"

#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>

namespace weightsync::ofi {

namespace {

// Bounds how long one write holds a rail, and how much is sent again when one fails.
constexpr std::uint64_t kMaxPieceBytes = std::uint64_t{4} << 20;

Error closed_error(const RemoteInfo& info) {
    return Error(Scope::kTransfer,
                 "the remote to " + info.peer + " was closed while an operation was in flight",
                 Facts{{"peer", info.peer}});
}

Facts facts_of(const RemoteInfo& info) {
    return {{"peer", info.peer}, {"generation", static_cast<std::int64_t>(info.generation)}};
}

}  // namespace

OfiRemote::OfiRemote(net::Reactor& reactor, std::shared_ptr<const LocalMemory> memory,
                     std::shared_ptr<RemoteInfo> info, std::unique_ptr<net::Channel> channel)
    : reactor_(reactor),
      memory_(std::move(memory)),
      info_(std::move(info)),
      channel_(std::move(channel)) {}

void OfiRemote::start(std::span<const std::shared_ptr<Rail>> rails,
                      const std::shared_ptr<const TargetView>& view, const Deadline& deadline) {
    std::uint64_t max_piece = kMaxPieceBytes;
    for (const auto& rail : rails) {
        max_piece = std::min(max_piece, rail->domain()->max_message_bytes());
    }
    const std::size_t num_paths = std::max(rails.size(), view->rails.size());
    queue_ = std::make_shared<SendQueue>(num_paths, std::max<std::uint64_t>(max_piece, 1),
                                         [weak = weak_from_this()](std::size_t path) {
                                             if (const auto self = weak.lock()) {
                                                 self->paths_[path]->wake();
                                             }
                                         });
    const std::shared_ptr<const RangeTable> ranges(info_, &info_->ranges);
    for (std::size_t i = 0; i < num_paths; ++i) {
        const std::size_t rail = i % rails.size();
        paths_.push_back(std::make_shared<SourcePath>(
            PathSpec{i, rails[rail], rail, view, i % view->rails.size(), info_->peer},
            weak_from_this(), queue_, ranges, memory_));
    }
    watch_ = reactor_.watch(channel_->socket(), EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET,
                            [weak = weak_from_this()](std::uint32_t /*events*/) {
                                if (const auto self = weak.lock()) {
                                    self->on_control();
                                }
                                return false;
                            });
    for (std::size_t i = 0; i < num_paths; ++i) {
        rails[i % rails.size()]->add(paths_[i]);
    }
    const auto is_proven = [&] {
        return has_failed_.load() ||
               std::ranges::all_of(paths_, [](const auto& path) { return path->is_proven(); });
    };
    const bool is_ready = wait_until(changed_, is_proven, deadline);
    if (has_failed_.load()) {
        const std::lock_guard lock(mutex_);
        throw *error_;
    }
    if (!is_ready) {
        throw Error(Scope::kTimeout,
                    info_->peer + " does not answer over " + paths_.front()->label() +
                        "; is it stopped, or its rail down?",
                    facts_of(*info_));
    }
}

void OfiRemote::on_control() noexcept {
    std::optional<Error> error;
    const bool is_alive = channel_->flush() && channel_->receive([&](const net::Frame& frame) {
        const auto type = static_cast<FrameType>(frame.type);
        if (!error && (type == FrameType::kFenced || type == FrameType::kClosed)) {
            error.emplace(Scope::kFenced,
                          info_->peer + " fenced or closed its target of generation " +
                              std::to_string(info_->generation) + "; connect to its next one",
                          facts_of(*info_));
        }
    });
    if (!error && !is_alive) {
        error.emplace(Scope::kPeer, info_->peer + " is gone; plan again without it",
                      facts_of(*info_));
    }
    if (error) {
        fail(*error);
    }
}

void OfiRemote::fail(const Error& error) noexcept {
    {
        const std::lock_guard lock(mutex_);
        if (error_) {
            return;
        }
        error_ = error;
        has_failed_.store(true);
    }
    queue_->fail(error);
    for (const auto& path : paths_) {
        path->close();
    }
    on_change();
}

void OfiRemote::post(std::shared_ptr<Operation> operation) {
    queue_->push(std::move(operation));
}

void OfiRemote::notify(std::span<const std::int32_t> /*immediates*/) {
    throw Error(Scope::kConfig, "nothing of " + info_->peer + " is mapped here");
}

void OfiRemote::close() noexcept {
    if (is_closed_.exchange(true)) {
        return;
    }
    reactor_.unwatch(watch_);
    if (queue_) {
        fail(closed_error(*info_));
    }
    // Only now: a sink that sees the hang-up counts on nothing of ours being on its way.
    channel_.reset();
}

}  // namespace weightsync::ofi
