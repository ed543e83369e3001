// The sink's end of a tcp target.
#pragma once

#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include <weightsync/fabric.hpp>

#include "../../net/channel.hpp"
#include "../../net/listener.hpp"
#include "sink_stream.hpp"

namespace weightsync::tcp {

class TcpTarget final : public TargetPort {
  public:
    // The listener, its reactor and the rails outlive the target. start() lets sources in.
    TcpTarget(EngineContext& context, net::Listener& listener, net::Reactor& reactor,
              std::vector<std::unique_ptr<Rail>>& rails, TargetSpec spec);
    ~TcpTarget() override;
    void start();

    [[nodiscard]] Board& board() noexcept override { return board_; }
    [[nodiscard]] std::vector<std::byte> descriptor() const override {
        return descriptor_.encode();
    }
    // All writing is done by our rails: their threads leave the memory and lose the sockets.
    void fence(bool discard) override;
    void close() noexcept override;

  private:
    using Stream = std::shared_ptr<SinkStream>;
    // One source: a control connection, unless it is just being replaced, and data connections.
    struct Session : Counted<Kind::kSession> {
        std::shared_ptr<net::Channel> control;
        std::uint64_t control_watch = 0;
        std::vector<Stream> streams;
        // Connections of a path up to this attempt are refused, by path; one more than the attempt.
        std::unordered_map<std::uint32_t, std::uint32_t> first_allowed;
    };
    using Sessions = std::unordered_map<std::uint64_t, Session>;

    void accept(net::Accepted accepted);
    void accept_control(net::Accepted accepted);
    void accept_data(net::Accepted accepted);
    [[nodiscard]] bool send_welcome(net::Channel& channel) const;
    bool on_stream(std::uint64_t session, const Stream& stream);
    void on_control(std::uint64_t session, const std::shared_ptr<net::Channel>& channel);
    void on_frame(std::uint64_t session, net::Channel& channel, const net::Frame& frame);
    void fence_path(std::uint64_t session, PathAttempt which);
    // Forgets a session that has no connection left. With mutex_ held.
    void forget_if_empty(Sessions::iterator session);
    void drop_all() noexcept;

    EngineContext& context_;
    net::Listener& listener_;
    net::Reactor& reactor_;
    std::vector<std::unique_ptr<Rail>>& rails_;
    const TargetSpec spec_;
    Descriptor descriptor_;
    Board board_;
    std::mutex mutex_;  // what follows; never held while a handler is waited for
    bool is_accepting_ = true;
    Sessions sessions_;
};

}  // namespace weightsync::tcp
