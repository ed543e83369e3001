// The sink's end: memory registered for writing, one receiver per path of every source.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include <weightsync/fabric.hpp>

#include "../../net/channel.hpp"
#include "../../net/listener.hpp"
#include "../../net/reactor.hpp"
#include "receiver.hpp"

namespace weightsync::verbs {

using Rails = std::vector<std::unique_ptr<Rail>>;

// What a source needs to find a target; inside the engine's descriptor.
struct Descriptor {
    std::uint64_t target_id = 0;
    std::uint64_t generation = 0;
    net::Key key{};
    std::vector<std::pair<std::string, std::uint16_t>> addresses;  // of the control connection

    [[nodiscard]] std::vector<std::byte> encode() const;
    [[nodiscard]] static Descriptor decode(std::span<const std::byte> bytes);
};

class VerbsTarget final : public TargetPort, public std::enable_shared_from_this<VerbsTarget> {
  public:
    VerbsTarget(EngineContext& context, net::Reactor& reactor, net::Listener& listener,
                const Rails& rails, TargetSpec spec);
    ~VerbsTarget() override { close(); }
    // After construction: lets sources in.
    void serve();

    [[nodiscard]] Board& board() noexcept override { return *board_; }
    [[nodiscard]] std::vector<std::byte> descriptor() const override {
        return descriptor_.encode();
    }
    void fence(bool discard) override;
    void flush() override { flush_.run(); }
    void close() noexcept override;

  private:
    // One connected source. Its handler runs on the reactor's thread, and so does what it holds.
    struct Session : std::enable_shared_from_this<Session>, Counted<Kind::kSession> {
        explicit Session(UniqueFd socket) : channel(std::move(socket)) {}
        net::Channel channel;
        std::string peer;
        std::uint64_t watch = 0;
        std::unordered_map<std::uint16_t, std::shared_ptr<Receiver>> receivers;
        std::unordered_map<std::uint16_t, std::uint32_t> attempts;
    };
    void register_ranges();
    void on_accept(net::Accepted accepted);
    void welcome(net::Channel& channel) const;
    // False when the session is over.
    [[nodiscard]] bool on_event(Session& session);
    void on_frame(Session& session, const net::Frame& frame);
    void open_path(Session& session, const PathEnd& source);
    void close_path(Session& session, std::uint16_t path) noexcept;
    void forget(std::uint64_t id) noexcept;
    void drop_sessions() noexcept;

    EngineContext& context_;
    net::Reactor& reactor_;
    net::Listener& listener_;
    const Rails& rails_;
    TargetSpec spec_;
    GpuFlush flush_;
    Descriptor descriptor_;
    std::shared_ptr<Board> board_;
    std::vector<RemoteRange> ranges_;  // neighbours merged
    std::vector<std::unique_ptr<Registration>> registrations_;

    std::mutex mutex_;  // what follows
    bool is_over_ = false;
    std::uint64_t next_session_ = 1;
    std::unordered_map<std::uint64_t, std::shared_ptr<Session>> sessions_;
};

}  // namespace weightsync::verbs
