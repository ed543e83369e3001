// Where sources knock: one port per address for all targets of an engine.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include <weightsync/operation.hpp>
#include <weightsync/os.hpp>

#include "address.hpp"
#include "handshake.hpp"
#include "reactor.hpp"

namespace weightsync::net {

// An authenticated connection.
struct Accepted {
    UniqueFd socket;  // non-blocking, without Nagle's delay
    Hello hello;
    std::size_t endpoint = 0;  // which of our addresses it came in by
    std::string peer;          // address and port of the source
};

// Everything but serve() and stop_serving() happens on the reactor's thread.
class Listener {
  public:
    // Called on the reactor's thread; throws to hang up.
    using OnAccept = std::function<void(Accepted)>;

    Listener(EngineContext& context, Reactor& reactor, std::vector<Address> addresses);
    // After the reactor was stopped.
    ~Listener() = default;
    Listener(const Listener&) = delete;
    Listener& operator=(const Listener&) = delete;

    // Addresses with their ports; listens from the first call on. Throws kConfig, kMemory.
    [[nodiscard]] std::vector<Address> endpoints();
    [[nodiscard]] std::uint64_t next_target_id();
    void serve(std::uint64_t target_id, const Key& key, std::uint64_t generation,
               OnAccept on_accept);
    // After it returns `on_accept` does not run; not from there, and not with a lock it takes.
    void stop_serving(std::uint64_t target_id) noexcept;

  private:
    struct Served {
        Key key{};
        std::uint64_t generation = 0;
        OnAccept on_accept;
        std::mutex mutex;  // held while on_accept runs
        bool is_over = false;
    };
    // Connected, and not yet proven.
    struct HalfOpen {
        UniqueFd socket;
        std::size_t endpoint = 0;
        std::uint64_t watch = 0;
        Deadline::Clock::time_point since;
        Hello hello;
        Nonce nonce{};
        bool has_hello = false;
        std::size_t num_received = 0;
        std::array<std::byte, sizeof(Hello)> received{};
    };

    void listen();
    void on_connect(std::size_t endpoint);
    void on_bytes(std::uint64_t id);
    // False when the connection is over, for better or worse.
    [[nodiscard]] bool advance(HalfOpen& half_open);
    [[nodiscard]] bool answer_hello(HalfOpen& half_open);
    void answer_proof(HalfOpen& half_open);
    void expire();
    void refuse(HalfOpen& half_open, Verdict verdict);
    [[nodiscard]] std::shared_ptr<Served> find(const Hello& hello);

    EngineContext& context_;
    Reactor& reactor_;
    const std::vector<Address> addresses_;
    std::mutex mutex_;  // what follows, but for half-open connections
    std::vector<Address> endpoints_;
    std::vector<UniqueFd> sockets_;
    std::vector<std::uint64_t> watches_;
    std::uint64_t next_target_ = 0;
    std::unordered_map<std::uint64_t, std::shared_ptr<Served>> served_;
    // Of the reactor's thread.
    Timer timer_;
    std::uint64_t next_half_open_ = 1;
    std::unordered_map<std::uint64_t, std::unique_ptr<HalfOpen>> half_open_;
};

}  // namespace weightsync::net
