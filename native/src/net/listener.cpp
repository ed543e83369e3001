#include "listener.hpp"

#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include <weightsync/error.hpp>

#include "dial.hpp"

namespace weightsync::net {

namespace {

// Enough for all streams of a fleet that connects at once; a stranger that opens more pushes out
// its own.
constexpr std::size_t kMaxHalfOpen = 1024;
constexpr std::chrono::seconds kHandshakeTime{5};

// A few bytes on a fresh connection always fit its buffer; one that takes less is broken.
bool send_now(int socket, std::span<const std::byte> bytes) noexcept {
    return ::send(socket, bytes.data(), bytes.size(), MSG_NOSIGNAL) ==
           static_cast<ssize_t>(bytes.size());
}

UniqueFd listen_at(const Address& address) {
    constexpr int kBacklog = 1024;
    UniqueFd socket(::socket(address.family(), SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!socket) {
        throw os_error(Scope::kMemory, "socket", errno, "check `ulimit -n`");
    }
    if (::bind(socket.get(), address.get(), address.length) != 0) {
        throw os_error(Scope::kConfig, "bind to " + address.host(), errno,
                       "give addresses of this host; see `ip address`");
    }
    if (::listen(socket.get(), kBacklog) != 0) {
        throw os_error(Scope::kMemory, "listen", errno, "");
    }
    return socket;
}

}  // namespace

Listener::Listener(EngineContext& context, Reactor& reactor, std::vector<Address> addresses)
    : context_(context), reactor_(reactor), addresses_(std::move(addresses)) {}

std::vector<Address> Listener::endpoints() {
    const std::lock_guard lock(mutex_);
    if (endpoints_.empty()) {
        listen();
    }
    return endpoints_;
}

void Listener::listen() {
    std::vector<UniqueFd> sockets;
    std::vector<Address> endpoints;
    for (const Address& address : addresses_) {
        sockets.push_back(listen_at(address));
        endpoints.push_back(Address::of_socket(sockets.back().get()));
    }
    for (std::size_t i = 0; i < sockets.size(); ++i) {
        watches_.push_back(reactor_.watch(sockets[i].get(), EPOLLIN, [this, i](std::uint32_t) {
            on_connect(i);
            return false;
        }));
    }
    watches_.push_back(reactor_.watch(timer_.get(), EPOLLIN, [this](std::uint32_t) {
        timer_.drain();
        expire();
        return false;
    }));
    sockets_ = std::move(sockets);
    endpoints_ = std::move(endpoints);
    // Distinct from those of a former process at the same port.
    next_target_ = random_u64() >> 1U;
}

std::uint64_t Listener::next_target_id() {
    [[maybe_unused]] const auto listening = endpoints();
    const std::lock_guard lock(mutex_);
    return next_target_++;
}

void Listener::serve(std::uint64_t target_id, const Key& key, std::uint64_t generation,
                     OnAccept on_accept) {
    auto served = std::make_shared<Served>();
    served->key = key;
    served->generation = generation;
    served->on_accept = std::move(on_accept);
    const std::lock_guard lock(mutex_);
    served_.emplace(target_id, std::move(served));
}

void Listener::stop_serving(std::uint64_t target_id) noexcept {
    std::shared_ptr<Served> served;
    {
        const std::lock_guard lock(mutex_);
        const auto found = served_.find(target_id);
        if (found == served_.end()) {
            return;
        }
        served = std::move(found->second);
        served_.erase(found);
    }
    const std::lock_guard lock(served->mutex);
    served->is_over = true;
    served->on_accept = nullptr;  // what it holds goes now, not with the last handshake
}

std::shared_ptr<Listener::Served> Listener::find(const Hello& hello) {
    const std::lock_guard lock(mutex_);
    const auto found = served_.find(hello.target_id);
    const bool is_ours = found != served_.end() && found->second->generation == hello.generation;
    return is_ours ? found->second : nullptr;
}

void Listener::on_connect(std::size_t endpoint) {
    int listening = -1;
    {
        const std::lock_guard lock(mutex_);
        if (endpoint < sockets_.size()) {
            listening = sockets_[endpoint].get();
        }
    }
    UniqueFd socket(::accept4(listening, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!socket) {
        if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
            // The knock stays in the backlog; without a pause we would spin until it goes away.
            context_.counters.add(Count::kRefusedConnections);
            constexpr useconds_t kPauseUs = 20'000;
            ::usleep(kPauseUs);
        }
        return;
    }
    set_socket_options(socket.get());
    if (half_open_.size() >= kMaxHalfOpen) {
        const auto oldest = std::ranges::min_element(
            half_open_, {}, [](const auto& entry) { return entry.second->since; });
        reactor_.unwatch(oldest->second->watch);
        half_open_.erase(oldest);
        context_.counters.add(Count::kRefusedConnections);
    }
    const std::uint64_t id = next_half_open_++;
    auto half_open = std::make_unique<HalfOpen>();
    half_open->endpoint = endpoint;
    half_open->since = Deadline::Clock::now();
    half_open->watch = reactor_.watch(socket.get(), EPOLLIN, [this, id](std::uint32_t) {
        on_bytes(id);
        return false;
    });
    half_open->socket = std::move(socket);
    if (half_open_.empty()) {
        timer_.set(kHandshakeTime);
    }
    half_open_.emplace(id, std::move(half_open));
}

void Listener::expire() {
    const auto now = Deadline::Clock::now();
    std::erase_if(half_open_, [&](const auto& entry) {
        if (now - entry.second->since < kHandshakeTime) {
            return false;
        }
        reactor_.unwatch(entry.second->watch);
        context_.counters.add(Count::kRefusedConnections);
        return true;
    });
    if (!half_open_.empty()) {
        timer_.set(std::chrono::seconds(1));
    }
}

void Listener::on_bytes(std::uint64_t id) {
    const auto found = half_open_.find(id);
    if (found == half_open_.end() || advance(*found->second)) {
        return;
    }
    reactor_.unwatch(found->second->watch);
    half_open_.erase(found);
    if (half_open_.empty()) {
        timer_.clear();
    }
}

bool Listener::advance(HalfOpen& half_open) {
    const std::size_t wanted = half_open.has_hello ? sizeof(Mac) : sizeof(Hello);
    const ssize_t got =
        ::recv(half_open.socket.get(), half_open.received.data() + half_open.num_received,
               wanted - half_open.num_received, 0);
    if (got <= 0) {
        if (got < 0 && (errno == EAGAIN || errno == EINTR)) {
            return true;
        }
        context_.counters.add(Count::kRefusedConnections);
        return false;
    }
    half_open.num_received += static_cast<std::size_t>(got);
    if (half_open.num_received < wanted) {
        return true;
    }
    half_open.num_received = 0;
    if (!half_open.has_hello) {
        half_open.has_hello = true;
        return answer_hello(half_open);
    }
    answer_proof(half_open);
    return false;
}

void Listener::refuse(HalfOpen& half_open, Verdict verdict) {
    context_.counters.add(Count::kRefusedConnections);
    if (half_open.nonce == Nonce{}) {
        Challenge challenge;
        challenge.verdict = verdict;
        send_now(half_open.socket.get(), bytes_of(challenge));
    } else {
        send_now(half_open.socket.get(), bytes_of(verdict));
    }
}

bool Listener::answer_hello(HalfOpen& half_open) {
    Hello& hello = half_open.hello;
    std::memcpy(&hello, half_open.received.data(), sizeof(hello));
    if (hello.magic != kHelloMagic || hello.version != kHelloVersion) {
        refuse(half_open, Verdict::kOtherVersion);
        return false;
    }
    const auto served = find(hello);
    if (!served) {
        refuse(half_open, Verdict::kGone);
        return false;
    }
    Challenge challenge;
    fill_random(challenge.nonce);
    half_open.nonce = challenge.nonce;
    challenge.proof = prove(served->key, true, hello, challenge.nonce);
    return send_now(half_open.socket.get(), bytes_of(challenge));
}

void Listener::answer_proof(HalfOpen& half_open) {
    Mac proof{};
    std::memcpy(proof.data(), half_open.received.data(), proof.size());
    const auto served = find(half_open.hello);
    if (!served) {
        refuse(half_open, Verdict::kGone);
        return;
    }
    if (!is_same(proof, prove(served->key, false, half_open.hello, half_open.nonce))) {
        refuse(half_open, Verdict::kWrongKey);
        return;
    }
    const std::lock_guard lock(served->mutex);
    if (served->is_over) {
        refuse(half_open, Verdict::kGone);
        return;
    }
    if (!send_now(half_open.socket.get(), bytes_of(Verdict::kWelcome))) {
        return;
    }
    reactor_.unwatch(half_open.watch);
    Accepted accepted;
    Address peer;
    peer.length = sizeof(peer.storage);
    if (::getpeername(half_open.socket.get(), reinterpret_cast<sockaddr*>(&peer.storage),
                      &peer.length) == 0) {
        accepted.peer = peer.text();
    }
    accepted.hello = half_open.hello;
    accepted.endpoint = half_open.endpoint;
    accepted.socket = std::move(half_open.socket);
    try {
        served->on_accept(std::move(accepted));
        context_.counters.add(Count::kConnections);
    } catch (const Error&) {
        context_.counters.add(Count::kRefusedConnections);
    }
}

}  // namespace weightsync::net
