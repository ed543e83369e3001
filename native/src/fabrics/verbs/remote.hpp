// The source's end: one sender per path, and the health of the paths.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <weightsync/fabric.hpp>
#include <weightsync/rails.hpp>

#include "../../net/channel.hpp"
#include "../../net/reactor.hpp"
#include "sender.hpp"
#include "target.hpp"

namespace weightsync::verbs {

class VerbsRemote final : public RemotePort, public std::enable_shared_from_this<VerbsRemote> {
  public:
    // `channel`: of the control connection, just opened.
    VerbsRemote(net::Reactor& reactor, const Rails& rails, UniqueFd channel, std::string label,
                std::uint64_t generation);
    ~VerbsRemote() override { close(); }
    // After construction: learns of the sink's memory and opens the paths. Throws kTimeout, kPeer,
    // or why no path at all could be opened.
    void connect(std::shared_ptr<const LocalMemory> memory, const net::Patience& patience);

    [[nodiscard]] const std::shared_ptr<RemoteInfo>& info() const noexcept override {
        return info_;
    }
    void post(std::shared_ptr<Operation> operation) override;
    void notify(std::span<const std::int32_t> immediates) override;
    void close() noexcept override;

    // Worst state of the paths over one of our rails, or "idle".
    [[nodiscard]] std::string_view state_of(std::size_t rail) const;

  private:
    using Clock = std::chrono::steady_clock;
    struct Path {
        PathHealth health;
        std::size_t rail = 0;
        std::uint16_t sink_rail = 0;
        std::uint32_t attempt = 0;  // of `sender`
        std::shared_ptr<Sender> sender;
        bool is_opening = false;
    };
    // What rails tell the reactor.
    struct Notice {
        std::size_t path = 0;
        std::uint32_t attempt = 0;
        std::optional<Error> error;  // none: a piece came through
    };

    void read_welcome(const net::Patience& patience);
    void make_paths(std::shared_ptr<const LocalMemory> memory);
    void ask_to_open(std::size_t index);
    void tell(std::size_t path, std::uint32_t attempt, std::optional<Error> error);

    // ---- on the reactor's thread, or while nothing is watched ----
    void watch();
    [[nodiscard]] bool on_frames();
    void on_frame(const net::Frame& frame);
    void on_opened(const PathEnd& end);
    void on_refused(const net::Frame& frame);
    void on_fenced(const PathName& name);
    void on_failed(const PathName& name);
    void on_notices();
    void on_timer();
    void set_timer();
    void on_path_failure(std::size_t index, const Error& error);
    [[nodiscard]] Rail& rail_of(const Path& path) const { return *rails_[path.rail]; }
    void drop_sender(Path& path) noexcept;
    // Ends everything: operations fail with `error`, memory is quiescent on return.
    void end(const Error& error) noexcept;
    void unwatch() noexcept;
    void wait_for_outstanding() noexcept;

    net::Reactor& reactor_;
    const Rails& rails_;
    net::Channel channel_;
    const std::shared_ptr<RemoteInfo> info_ = std::make_shared<RemoteInfo>();
    const std::shared_ptr<Outbox> outbox_ = std::make_shared<Outbox>();
    EventFd notice_event_;
    net::Timer timer_;
    std::optional<Error> refusal_;  // the last one while connecting
    bool is_connected_ = false;

    mutable std::mutex mutex_;  // what follows; of paths_ the health, for state_of()
    std::vector<Path> paths_;
    std::vector<Notice> notices_;
    std::vector<std::uint64_t> watches_;
    bool is_over_ = false;
    bool is_fenced_ = false;  // the sink said goodbye
};

}  // namespace weightsync::verbs
