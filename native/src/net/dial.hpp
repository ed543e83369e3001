// The client's half of the handshake.
#pragma once

#include <atomic>
#include <optional>
#include <string>

#include <weightsync/os.hpp>

#include "address.hpp"
#include "handshake.hpp"

namespace weightsync::net {

// How long to wait, and who may end it.
struct Patience {
    Deadline deadline;
    // Looked at every 100 ms. Null on threads of the host language, whose signals are looked at
    // instead; our own threads must not do that.
    const std::atomic<bool>* is_cancelled = nullptr;
    // Throws kTransfer when cancelled, or what a signal handler throws.
    void check() const;
};

// Waits until `socket` has one of `events` (POLLIN, ...). Throws kTimeout with `what`.
void await(int socket, short events, const Patience& patience, const std::string& what);

// Connects, from `local` when it is given, and proves who we are. `hello` gets a fresh nonce.
// Returns a non-blocking socket without Nagle's delay. `label` names the peer in errors.
// Throws kPeer (nobody listens, or hung up), kFenced (target or generation is gone), kAuth (wrong
// key), kTimeout, kConfig (another version, or not one of ours).
[[nodiscard]] UniqueFd dial(const Address& to, const std::optional<Address>& local, Hello hello,
                            const Key& key, const std::string& label, const Patience& patience);

// Options of every connection of ours: no delay, keepalive, and an end to waiting for a host that
// is gone.
void set_socket_options(int socket) noexcept;

}  // namespace weightsync::net
