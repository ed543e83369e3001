// The source's ends of the local fabric.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include <weightsync/copy.hpp>
#include <weightsync/fabric.hpp>

#include "../../net/reactor.hpp"
#include "gate.hpp"
#include "pull_memory.hpp"
#include "wire.hpp"

namespace weightsync::local {

// A connected peer: where it is, and whether it still lives.
struct Peer {
    std::string label;  // "local pid 42"
    UniqueFd socket;
    UniqueFd pidfd;
};

class LocalRemote : public RemotePort, public std::enable_shared_from_this<LocalRemote> {
  public:
    LocalRemote(EngineContext& context, net::Reactor& reactor, CopyPool& pool, Peer peer)
        : context_(context), reactor_(reactor), pool_(pool), peer_(std::move(peer)) {}

    [[nodiscard]] const std::shared_ptr<RemoteInfo>& info() const noexcept final { return info_; }
    // After construction: notices when the peer goes away.
    virtual void start();

  protected:
    // Why nothing can be written any more, if so.
    [[nodiscard]] std::optional<Error> peer_error() const;
    [[nodiscard]] virtual bool is_closed_by_peer() const noexcept = 0;
    // On the reactor's thread.
    virtual void on_peer_gone() {}
    void unwatch() noexcept;

    EngineContext& context_;
    net::Reactor& reactor_;
    CopyPool& pool_;
    Peer peer_;
    std::shared_ptr<RemoteInfo> info_ = std::make_shared<RemoteInfo>();
    std::atomic<bool> is_peer_gone_{false};

  private:
    // Atomic: the peer may go before start() has both.
    std::atomic<std::uint64_t> socket_watch_{0};
    std::atomic<std::uint64_t> pidfd_watch_{0};
};

// `fds`: of the reply, in the order that wire.hpp gives.
[[nodiscard]] std::shared_ptr<LocalRemote> make_push_remote(EngineContext& context,
                                                            net::Reactor& reactor, CopyPool& pool,
                                                            Peer peer, std::vector<UniqueFd> fds);
[[nodiscard]] std::shared_ptr<LocalRemote> make_pull_remote(EngineContext& context,
                                                            net::Reactor& reactor, CopyPool& pool,
                                                            PullMemory& memory, Peer peer,
                                                            EventFd completion,
                                                            std::vector<UniqueFd> fds);

}  // namespace weightsync::local
