#include "listener.hpp"

#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdio>

namespace weightsync::local {

namespace {

std::string random_name() {
    std::array<char, 48> text{};
    std::snprintf(text.data(), text.size(), "weightsync-%016llx%016llx",
                  static_cast<unsigned long long>(random_u64()),
                  static_cast<unsigned long long>(random_u64()));
    return text.data();
}

bool same_key(const Key& a, const Key& b) noexcept {
    unsigned difference = 0;  // no early exit: time must not tell how much of a guess was right
    for (std::size_t i = 0; i < a.size(); ++i) {
        difference |= std::to_integer<unsigned>(a[i] ^ b[i]);
    }
    return difference == 0;
}

void refuse(int socket, Scope scope, std::string_view message) noexcept {
    Reply reply;
    reply.scope = static_cast<std::int32_t>(scope);
    message.copy(reply.message.data(), reply.message.size() - 1);
    try {
        send_message(socket, bytes_of(reply), {});
    } catch (const Error&) {
        // It has hung up already, so it needs no answer.
        return;
    }
}

}  // namespace

Listener::Listener(EngineContext& context, net::Reactor& reactor)
    : context_(context),
      reactor_(reactor),
      name_(random_name()),
      socket_(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0)) {
    constexpr int kBacklog = 1024;  // all sources of a fleet may connect at once
    const auto [address, length] = abstract_address(name_);
    if (!socket_ ||
        ::bind(socket_.get(), reinterpret_cast<const sockaddr*>(&address), length) != 0 ||
        ::listen(socket_.get(), kBacklog) != 0) {
        throw os_error(Scope::kMemory, "listening on a unix socket", errno,
                       "check `ulimit -n` and seccomp");
    }
}

Listener::~Listener() {
    reactor_.unwatch(watch_);
    for (const auto& [id, pending] : pending_) {
        reactor_.unwatch(id);
    }
}

void Listener::start() {
    watch_ = reactor_.watch(socket_.get(), EPOLLIN, [weak = weak_from_this()](std::uint32_t) {
        if (const auto self = weak.lock()) {
            self->on_connect();
        }
        return false;
    });
}

void Listener::add(const std::shared_ptr<LocalTarget>& target) {
    const std::lock_guard lock(mutex_);
    std::erase_if(targets_, [](const auto& entry) { return entry.second.expired(); });
    targets_.emplace(target->identity().target_id, target);
}

void Listener::on_connect() {
    UniqueFd socket(::accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!socket) {
        return;
    }
    const PeerId peer = peer_of(socket.get());
    if (peer.uid != ::geteuid()) {
        context_.counters.add(Count::kRefusedConnections);
        refuse(socket.get(), Scope::kAuth, "only processes of the same user may connect");
        return;
    }
    const int fd = socket.get();
    const auto pending = std::make_shared<Pending>(std::move(socket), peer);
    // Set before the handler can run: that happens on this thread.
    const auto id = std::make_shared<std::uint64_t>(0);
    *id = reactor_.watch(fd, EPOLLIN | EPOLLRDHUP, [weak = weak_from_this(), id](std::uint32_t) {
        if (const auto self = weak.lock()) {
            self->on_request(*id);
        }
        return false;
    });
    const std::lock_guard lock(mutex_);
    pending_.emplace(*id, pending);
}

void Listener::on_request(std::uint64_t id) {
    std::shared_ptr<Pending> pending;
    {
        const std::lock_guard lock(mutex_);
        const auto found = pending_.find(id);
        if (found == pending_.end()) {
            return;
        }
        pending = std::move(found->second);
        pending_.erase(found);
    }
    reactor_.unwatch(id);
    Request request;
    std::vector<UniqueFd> fds;
    const auto got = receive_message(pending->socket.get(), bytes_of(request), fds);
    if (!got || *got == 0) {
        return;
    }
    try {
        const auto target = find(request, *got);
        target->accept(pending->socket, pending->peer, request, std::move(fds));
    } catch (const Error& error) {
        context_.counters.add(Count::kRefusedConnections);
        if (pending->socket) {
            refuse(pending->socket.get(), error.scope(), error.detail());
        }
    }
}

std::shared_ptr<LocalTarget> Listener::find(const Request& request, std::size_t nbytes) {
    if (nbytes != sizeof(Request) || request.magic != kMagic || request.version != kWireVersion) {
        throw Error(Scope::kConfig,
                    "the source speaks another version of weightsync; update one side");
    }
    std::shared_ptr<LocalTarget> target;
    {
        const std::lock_guard lock(mutex_);
        const auto found = targets_.find(request.target_id);
        target = found == targets_.end() ? nullptr : found->second.lock();
    }
    if (!target || target->identity().generation != request.generation) {
        throw Error(Scope::kFenced, "the target of that generation is gone; use the next one");
    }
    if (!same_key(target->identity().key, request.key)) {
        throw Error(Scope::kAuth, "wrong key; the descriptor is damaged or forged");
    }
    return target;
}

}  // namespace weightsync::local
