// The sink's ends of the local fabric.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include <weightsync/copy.hpp>
#include <weightsync/fabric.hpp>

#include "../../net/reactor.hpp"
#include "gate.hpp"
#include "pull_memory.hpp"
#include "wire.hpp"

namespace weightsync::local {

// One connected source.
struct Session : Counted<Kind::kSession> {
    std::uint64_t id = 0;
    PeerId peer;
    UniqueFd socket;
    UniqueFd pidfd;
    std::uint64_t socket_watch = 0;
    std::uint64_t pidfd_watch = 0;
    // pull only
    EventFd source_event{UniqueFd()};
    std::unique_ptr<Mapping> channel_mapping;
    // reactor thread only
    std::uint64_t next_entry = 0;
    std::uint64_t notes_version = 0;
    std::shared_ptr<const Imports> imports;  // of those notes; guarded by the target's mutex

    [[nodiscard]] Channel& channel() const noexcept {
        return *reinterpret_cast<Channel*>(channel_mapping->data());
    }
    // What was read from the source's memory just now must not be used: it withdrew, or it ended
    // and its number may already be another process'.
    [[nodiscard]] bool is_void() const noexcept {
        return channel().is_withdrawn.load(std::memory_order_seq_cst) != 0 ||
               has_exited(pidfd.get());
    }
};

class LocalTarget : public TargetPort, public std::enable_shared_from_this<LocalTarget> {
  public:
    LocalTarget(EngineContext& context, net::Reactor& reactor, Descriptor descriptor,
                TargetSpec spec)
        : context_(context),
          reactor_(reactor),
          descriptor_(std::move(descriptor)),
          spec_(std::move(spec)) {}

    [[nodiscard]] std::vector<std::byte> descriptor() const final { return descriptor_.encode(); }
    [[nodiscard]] const Descriptor& identity() const noexcept { return descriptor_; }
    // On the reactor's thread: a peer with the right key asks to connect. Throws to refuse.
    // The socket is taken over only on success.
    void accept(UniqueFd& socket, const PeerId& peer, const Request& request,
                std::vector<UniqueFd> fds);
    void close() noexcept override;

  protected:
    // Checks what the mode needs of a new session and returns the descriptors of the reply;
    // `keep` owns what must live until they are sent.
    virtual std::vector<int> welcome(Session& session, const Request& request,
                                     std::vector<UniqueFd>& keep) = 0;
    // Closes the door and lets go of all sources.
    void drop_sessions() noexcept;
    // A source is gone or hung up; without the mutex.
    virtual void let_go(Session& /*session*/) noexcept {}

    EngineContext& context_;
    net::Reactor& reactor_;
    Descriptor descriptor_;
    TargetSpec spec_;
    std::mutex mutex_;  // sessions_, is_accepting_
    bool is_accepting_ = true;
    std::unordered_map<std::uint64_t, std::shared_ptr<Session>> sessions_;

  private:
    void forget(std::uint64_t session_id) noexcept;
    void unwatch(Session& session) noexcept;
    std::uint64_t next_session_ = 1;
};

// Sources write into sink-owned memfds and set the bits themselves.
[[nodiscard]] std::shared_ptr<LocalTarget> make_push_target(EngineContext& context,
                                                            net::Reactor& reactor,
                                                            Descriptor descriptor, TargetSpec spec);
// Memory is private to the sink: its threads read the sources' memory and set the bits.
[[nodiscard]] std::shared_ptr<LocalTarget> make_pull_target(EngineContext& context,
                                                            net::Reactor& reactor, CopyPool& pool,
                                                            PullMemory& memory,
                                                            Descriptor descriptor, TargetSpec spec);

}  // namespace weightsync::local
