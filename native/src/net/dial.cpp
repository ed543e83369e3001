#include "dial.hpp"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <cerrno>
#include <chrono>

#include <weightsync/error.hpp>

namespace weightsync::net {

namespace {

void send_all(int socket, std::span<const std::byte> bytes, const Patience& patience,
              const std::string& label) {
    while (!bytes.empty()) {
        const ssize_t sent = ::send(socket, bytes.data(), bytes.size(), MSG_NOSIGNAL);
        if (sent >= 0) {
            bytes = bytes.subspan(static_cast<std::size_t>(sent));
        } else if (errno == EAGAIN) {
            await(socket, POLLOUT, patience, label + " takes nothing; is it stopped?");
        } else if (errno != EINTR) {
            throw Error(Scope::kPeer, label + " hung up while connecting", {{"peer", label}});
        }
    }
}

template <class Message>
Message receive(int socket, const Patience& patience, const std::string& label) {
    Message message{};
    auto bytes = std::as_writable_bytes(std::span(&message, 1));
    while (!bytes.empty()) {
        const ssize_t got = ::recv(socket, bytes.data(), bytes.size(), 0);
        if (got > 0) {
            bytes = bytes.subspan(static_cast<std::size_t>(got));
        } else if (got < 0 && errno == EAGAIN) {
            await(socket, POLLIN, patience, label + " did not answer; is it stopped?");
        } else if (got == 0 || errno != EINTR) {
            throw Error(Scope::kPeer, label + " hung up while connecting", {{"peer", label}});
        }
    }
    return message;
}

void check_verdict(Verdict verdict, const std::string& label, std::uint64_t generation) {
    switch (verdict) {
        case Verdict::kWelcome:
            return;
        case Verdict::kGone:
            throw Error(Scope::kFenced,
                        label + " refused: the target of generation " + std::to_string(generation) +
                            " is gone; use the next one",
                        {{"peer", label}});
        case Verdict::kWrongKey:
            throw Error(Scope::kAuth,
                        label + " refused: wrong key; the descriptor is damaged or forged",
                        {{"peer", label}});
        case Verdict::kOtherVersion:
            break;
    }
    throw Error(Scope::kConfig, label + " speaks another version of weightsync; update one side",
                {{"peer", label}});
}

UniqueFd connect_socket(const Address& to, const std::optional<Address>& local,
                        const std::string& label, const Patience& patience) {
    UniqueFd socket(::socket(to.family(), SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!socket) {
        throw os_error(Scope::kMemory, "socket", errno, "check `ulimit -n`");
    }
    if (local && local->family() == to.family()) {
        const int on = 1;
        // The port is chosen by connect(), so the local end may be shared by many peers.
        ::setsockopt(socket.get(), IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof(on));
        if (::bind(socket.get(), local->get(), local->length) != 0) {
            throw os_error(Scope::kRail, "bind to " + local->host(), errno,
                           "is it still an address of this host?");
        }
    }
    if (::connect(socket.get(), to.get(), to.length) == 0) {
        return socket;
    }
    int error = errno;
    if (error == EINPROGRESS) {
        await(socket.get(), POLLOUT, patience,
              label + " (" + to.text() + ") did not accept a connection; is it stopped?");
        socklen_t length = sizeof(error);
        ::getsockopt(socket.get(), SOL_SOCKET, SO_ERROR, &error, &length);
    }
    if (error == 0) {
        return socket;
    }
    if (error == ECONNREFUSED) {
        throw Error(Scope::kPeer,
                    label + " does not listen at " + to.text() +
                        ": it has ended, or runs in another network namespace; plan again "
                        "without it",
                    {{"peer", label}});
    }
    throw os_error(Scope::kPeer, "connect to " + label + " at " + to.text(), error,
                   "is there a route between the two addresses?");
}

}  // namespace

void Patience::check() const {
    if (is_cancelled == nullptr) {
        check_interrupt();
    } else if (is_cancelled->load()) {
        throw Error(Scope::kTransfer, "the remote was closed while it connected");
    }
}

void await(int socket, short events, const Patience& patience, const std::string& what) {
    for (;;) {
        pollfd entry{socket, events, 0};
        const auto slice =
            std::chrono::ceil<std::chrono::milliseconds>(patience.deadline.remaining(kSlice));
        if (::poll(&entry, 1, static_cast<int>(slice.count())) > 0) {
            return;
        }
        if (patience.deadline.passed()) {
            throw Error(Scope::kTimeout, what);
        }
        patience.check();
    }
}

void set_socket_options(int socket) noexcept {
    const auto set = [socket](int level, int name, int value) {
        ::setsockopt(socket, level, name, &value, sizeof(value));
    };
    constexpr int kGoneMs = 60'000;  // a frozen peer is not gone: other deadlines are for that
    set(IPPROTO_TCP, TCP_NODELAY, 1);
    set(IPPROTO_TCP, TCP_USER_TIMEOUT, kGoneMs);
    set(SOL_SOCKET, SO_KEEPALIVE, 1);
    set(IPPROTO_TCP, TCP_KEEPIDLE, 20);
    set(IPPROTO_TCP, TCP_KEEPINTVL, 10);
    set(IPPROTO_TCP, TCP_KEEPCNT, 4);
}

UniqueFd dial(const Address& to, const std::optional<Address>& local, Hello hello, const Key& key,
              const std::string& label, const Patience& patience) {
    UniqueFd socket = connect_socket(to, local, label, patience);
    set_socket_options(socket.get());
    fill_random(hello.nonce);
    send_all(socket.get(), bytes_of(hello), patience, label);
    const auto challenge = receive<Challenge>(socket.get(), patience, label);
    check_verdict(challenge.verdict, label, hello.generation);
    // One that does not know the key gets a proof that proves nothing, and says that it is wrong:
    // a sink with another key counts us as refused.
    const bool is_genuine = is_same(challenge.proof, prove(key, true, hello, challenge.nonce));
    const Mac proof = is_genuine ? prove(key, false, hello, challenge.nonce) : Mac{};
    send_all(socket.get(), proof, patience, label);
    const auto verdict = receive<Verdict>(socket.get(), patience, label);
    check_verdict(is_genuine ? verdict : Verdict::kWrongKey, label, hello.generation);
    return socket;
}

}  // namespace weightsync::net
