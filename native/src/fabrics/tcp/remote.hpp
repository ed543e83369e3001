// The source's end of a tcp target.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include <weightsync/fabric.hpp>

#include "../../net/channel.hpp"
#include "../../net/worker.hpp"
#include "path.hpp"

namespace weightsync::tcp {

// What all remotes of an engine use; outlives them.
struct Shared {
    EngineContext& context;
    std::vector<std::unique_ptr<Rail>>& rails;
    net::Reactor& reactor;  // of control connections: "ws-accept"
    net::Worker& worker;
    int num_streams;             // of each path
    std::uint64_t window_bytes;  // of each stream
};

class TcpRemote final : public RemotePort, private PathOwner {
  public:
    // Connects; throws as Engine::connect says.
    [[nodiscard]] static std::shared_ptr<TcpRemote> make(const Shared& shared,
                                                         Descriptor descriptor,
                                                         const Deadline& deadline);
    // Use make().
    TcpRemote(const Shared& shared, Descriptor descriptor);
    ~TcpRemote() override;

    [[nodiscard]] const std::shared_ptr<RemoteInfo>& info() const noexcept override {
        return info_;
    }
    void post(std::shared_ptr<Operation> operation) override { queue_->push(std::move(operation)); }
    void notify(std::span<const std::int32_t> immediates) override;
    void close() noexcept override;

    // Adds what goes over a rail: bytes on their way, and the worst state of its paths.
    void add_to(const Rail& rail, RailInfo& info) const;

  private:
    void connect(const Deadline& deadline);
    [[nodiscard]] net::Hello hello(net::LinkKind kind) const;
    [[nodiscard]] std::unique_ptr<net::Channel> dial_control(const net::Patience& patience,
                                                             bool is_again);
    // What the sink says first: what it exports, and the width of chunk numbers.
    [[nodiscard]] std::pair<RangeTable, int> receive_welcome(net::Channel& channel,
                                                             const net::Patience& patience) const;
    [[nodiscard]] std::vector<UniqueFd> dial_path(std::size_t path, std::uint32_t attempt,
                                                  const net::Patience& patience);
    void use_control(std::unique_ptr<net::Channel> channel);

    void on_path_failed(std::size_t path) noexcept override;
    void on_path_stalled(std::size_t path) noexcept override;
    // On the reactor's thread.
    void on_control(const std::shared_ptr<net::Channel>& channel);
    void on_frame(const net::Frame& frame);
    void on_event();
    void on_timer();
    void set_timer();
    void on_fenced(PathAttempt which);
    // By the worker.
    void probe(std::size_t path) noexcept;
    void redial() noexcept;
    void want_redial();

    // Lets nothing be read or sent any more, then fails what is left. Any thread but a rail's.
    void end(const Error& error) noexcept;
    [[nodiscard]] Error closed_error() const;
    [[nodiscard]] Error gone_error() const;

    const Shared shared_;
    const Descriptor descriptor_;
    const std::uint64_t session_;
    std::vector<net::Address> endpoints_;
    std::string label_;
    std::shared_ptr<RemoteInfo> info_ = std::make_shared<RemoteInfo>();
    std::unique_ptr<SendQueue> queue_;
    std::vector<std::unique_ptr<Path>> paths_;

    // Notes of paths for the reactor's thread.
    struct Notes {
        std::atomic<bool> has_failed{false};
        std::atomic<bool> is_stalled{false};
        std::atomic<bool> is_probing{false};  // the worker builds it
    };
    std::unique_ptr<Notes[]> notes_;
    const EventFd event_;
    const net::Timer timer_;
    std::uint64_t event_watch_ = 0;
    std::uint64_t timer_watch_ = 0;
    std::atomic<bool> is_closed_{false};  // also ends what is being dialled
    std::atomic<bool> is_redialling_{false};

    std::mutex control_mutex_;  // the two that follow
    std::shared_ptr<net::Channel> control_;
    std::uint64_t control_watch_ = 0;
    std::atomic<int> num_unanswered_{0};  // pings since the last pong

    std::mutex end_mutex_;
    std::atomic<bool> is_ended_{false};
};

}  // namespace weightsync::tcp
