#include "target.hpp"

#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>

namespace weightsync::local {

void LocalTarget::accept(UniqueFd& socket, const PeerId& peer, const Request& request,
                         std::vector<UniqueFd> fds) {
    auto session = std::make_shared<Session>();
    session->peer = peer;
    session->pidfd = open_peer_pidfd(socket.get(), peer.pid);
    if (!fds.empty()) {
        session->source_event = EventFd(std::move(fds.front()));
    }
    // Held throughout: fence() must find every session that was given a descriptor.
    const std::lock_guard lock(mutex_);
    if (!is_accepting_) {
        throw Error(Scope::kFenced, "the target was fenced or closed");
    }
    std::vector<UniqueFd> keep;
    const std::vector<int> reply_fds = welcome(*session, request, keep);
    Reply reply;
    send_message(socket.get(), bytes_of(reply), reply_fds);
    session->socket = std::move(socket);
    session->id = next_session_++;
    sessions_.emplace(session->id, session);
    const auto on_gone = [weak = weak_from_this(), id = session->id](std::uint32_t) {
        if (const auto self = std::static_pointer_cast<LocalTarget>(weak.lock())) {
            self->forget(id);
        }
        return false;
    };
    session->socket_watch =
        reactor_.watch(session->socket.get(), EPOLLRDHUP | EPOLLHUP | EPOLLERR, on_gone);
    session->pidfd_watch = reactor_.watch(session->pidfd.get(), EPOLLIN, on_gone);
    context_.counters.add(Count::kConnections);
}

void LocalTarget::unwatch(Session& session) noexcept {
    reactor_.unwatch(session.socket_watch);
    reactor_.unwatch(session.pidfd_watch);
}

void LocalTarget::forget(std::uint64_t session_id) noexcept {
    std::shared_ptr<Session> session;
    {
        const std::lock_guard lock(mutex_);
        const auto found = sessions_.find(session_id);
        if (found == sessions_.end()) {
            return;
        }
        session = std::move(found->second);
        sessions_.erase(found);
        unwatch(*session);
    }
    let_go(*session);
}

void LocalTarget::drop_sessions() noexcept {
    std::unordered_map<std::uint64_t, std::shared_ptr<Session>> sessions;
    {
        const std::lock_guard lock(mutex_);
        is_accepting_ = false;
        sessions.swap(sessions_);
    }
    for (auto& [id, session] : sessions) {
        unwatch(*session);
        ::shutdown(session->socket.get(), SHUT_RDWR);
    }
}

void LocalTarget::close() noexcept {
    drop_sessions();
}

namespace {

class PushTarget final : public LocalTarget {
  public:
    PushTarget(EngineContext& context, net::Reactor& reactor, Descriptor descriptor,
               TargetSpec spec)
        : LocalTarget(context, reactor, std::move(descriptor), std::move(spec)) {
        for (const ExportedRange& range : spec_.exported) {
            if (std::ranges::find(blocks_, range.block) == blocks_.end()) {
                blocks_.push_back(range.block);
            }
        }
        constexpr std::size_t kOthers = 2;  // control memory and the eventfd
        if (blocks_.size() > kMaxFds - kOthers) {
            throw Error(Scope::kConfig, std::to_string(blocks_.size()) +
                                            " separate memories in one target; at most " +
                                            std::to_string(kMaxFds - kOthers) +
                                            " are possible: allocate one and slice it");
        }
        control_ = write_control(spec_, Mode::kPush, blocks_);
        board_.emplace(spec_.slots, control_.board, context_.progress.event.get(),
                       control_.mapping);
    }

    [[nodiscard]] Board& board() noexcept override { return *board_; }

    void fence(bool discard) override {
        // Well-behaved sources stop here; for the others the memory is taken away.
        board_->close();
        drop_sessions();
        for (const auto& block : blocks_) {
            block->renew(!discard);
        }
    }

  private:
    std::vector<int> welcome(Session& /*session*/, const Request& /*request*/,
                             std::vector<UniqueFd>& /*keep*/) override {
        std::vector<int> fds{control_.fd.get(), context_.progress.event.get()};
        for (const auto& block : blocks_) {
            block->set_exposed();
            fds.push_back(block->fd());
        }
        return fds;
    }

    std::vector<std::shared_ptr<Block>> blocks_;
    ControlMemory control_;
    std::optional<Board> board_;
};

}  // namespace

std::shared_ptr<LocalTarget> make_push_target(EngineContext& context, net::Reactor& reactor,
                                              Descriptor descriptor, TargetSpec spec) {
    return std::make_shared<PushTarget>(context, reactor, std::move(descriptor), std::move(spec));
}

}  // namespace weightsync::local
