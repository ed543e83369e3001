// Where sources knock: one abstract unix socket for all targets of an engine.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "target.hpp"

namespace weightsync::local {

class Listener : public std::enable_shared_from_this<Listener> {
  public:
    Listener(EngineContext& context, net::Reactor& reactor);
    ~Listener();
    Listener(const Listener&) = delete;
    Listener& operator=(const Listener&) = delete;

    void start();
    [[nodiscard]] const std::string& name() const noexcept { return name_; }
    [[nodiscard]] std::uint64_t next_target_id() noexcept { return next_target_.fetch_add(1); }
    void add(const std::shared_ptr<LocalTarget>& target);

  private:
    // Connected, and still to say what it wants.
    struct Pending {
        UniqueFd socket;
        PeerId peer;
    };
    void on_connect();
    void on_request(std::uint64_t id);
    [[nodiscard]] std::shared_ptr<LocalTarget> find(const Request& request, std::size_t nbytes);

    EngineContext& context_;
    net::Reactor& reactor_;
    std::string name_;
    UniqueFd socket_;
    std::uint64_t watch_ = 0;
    std::atomic<std::uint64_t> next_target_{1};
    std::mutex mutex_;
    std::unordered_map<std::uint64_t, std::weak_ptr<LocalTarget>> targets_;
    std::unordered_map<std::uint64_t, std::shared_ptr<Pending>> pending_;
};

}  // namespace weightsync::local
