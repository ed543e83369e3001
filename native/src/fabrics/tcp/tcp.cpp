// Hosts without RDMA: the sink's own threads place what sources send over a few connections.
#include <algorithm>
#include <mutex>

#include <weightsync/fabrics.hpp>

#include "../../net/listener.hpp"
#include "remote.hpp"
#include "target.hpp"

namespace weightsync::tcp {

namespace {

class TcpFabric final : public Fabric {
  public:
    TcpFabric(EngineContext& context, const std::vector<net::Address>& addresses, bool is_bound,
              const TcpOptions& options)
        : context_(context),
          num_streams_(options.num_streams),
          window_bytes_(options.window_bytes),
          reactor_("ws-accept"),
          listener_(context, reactor_, addresses) {
        for (const net::Address& address : addresses) {
            rails_.push_back(std::make_unique<Rail>(rails_.size(), address, is_bound));
        }
    }
    ~TcpFabric() override { stop(); }

    [[nodiscard]] std::string_view name() const noexcept override { return "tcp"; }

    [[nodiscard]] std::shared_ptr<TargetPort> export_target(TargetSpec spec) override {
        auto target =
            std::make_shared<TcpTarget>(context_, listener_, reactor_, rails_, std::move(spec));
        target->start();
        return target;
    }

    [[nodiscard]] std::shared_ptr<RemotePort> connect(std::span<const std::byte> bytes,
                                                      const Deadline& deadline) override {
        auto remote =
            TcpRemote::make({context_, rails_, reactor_, worker_, num_streams_, window_bytes_},
                            Descriptor::decode(bytes), deadline);
        const std::lock_guard lock(mutex_);
        std::erase_if(remotes_, [](const auto& known) { return known.expired(); });
        remotes_.push_back(remote);
        return remote;
    }

    [[nodiscard]] std::vector<RailInfo> rails() override {
        std::vector<std::shared_ptr<TcpRemote>> remotes;
        {
            const std::lock_guard lock(mutex_);
            for (const auto& known : remotes_) {
                if (auto remote = known.lock()) {
                    remotes.push_back(std::move(remote));
                }
            }
        }
        std::vector<RailInfo> infos;
        for (const auto& rail : rails_) {
            RailInfo info;
            info.name = rail->name;
            info.address = rail->address.host();
            info.state = "idle";
            info.bytes_out = rail->bytes_out.load();
            info.bytes_in = rail->bytes_in.load();
            for (const auto& remote : remotes) {
                remote->add_to(*rail, info);
            }
            infos.push_back(std::move(info));
        }
        return infos;
    }

    void stop() noexcept override {
        worker_.stop();
        reactor_.stop();
        for (const auto& rail : rails_) {
            rail->reactor.stop();
        }
    }

  private:
    EngineContext& context_;
    const int num_streams_;
    const std::uint64_t window_bytes_;
    std::vector<std::unique_ptr<Rail>> rails_;
    net::Reactor reactor_;
    net::Worker worker_;
    net::Listener listener_;
    std::mutex mutex_;
    std::vector<std::weak_ptr<TcpRemote>> remotes_;
};

}  // namespace

}  // namespace weightsync::tcp

namespace weightsync {

std::unique_ptr<Fabric> make_tcp_fabric(EngineContext& context, const TcpOptions& options) {
    constexpr int kMaxStreams = 32;
    if (options.num_streams < 1 || options.num_streams > kMaxStreams) {
        throw Error(Scope::kConfig, std::to_string(options.num_streams) +
                                        " streams on each rail; give 1 .. " +
                                        std::to_string(kMaxStreams));
    }
    constexpr std::uint64_t kLeastWindowBytes = std::uint64_t{64} << 10U;
    constexpr std::uint64_t kMostWindowBytes = std::uint64_t{1} << 30U;
    if (options.window_bytes < kLeastWindowBytes || options.window_bytes > kMostWindowBytes) {
        throw Error(Scope::kConfig, "a window of " + std::to_string(options.window_bytes) +
                                        " bytes; give 64 KiB .. 1 GiB");
    }
    if (options.addresses.size() > tcp::kMaxRails) {
        throw Error(Scope::kConfig, std::to_string(options.addresses.size()) +
                                        " addresses; at most " + std::to_string(tcp::kMaxRails));
    }
    if (const char* problem = net::libcrypto_problem()) {
        throw Error(Scope::kConfig, std::string("the tcp fabric cannot authenticate: ") + problem);
    }
    std::vector<net::Address> addresses;
    for (const std::string& host : options.addresses) {
        addresses.push_back(net::Address::parse(host, 0));
        if (addresses.back().is_any()) {
            throw Error(Scope::kConfig, "'" + host +
                                            "' is no address that a peer can connect to; give "
                                            "the addresses of the NICs, one for each rail");
        }
    }
    const bool is_bound = !addresses.empty();
    if (!is_bound) {
        addresses.push_back(net::Address::parse("127.0.0.1", 0));
    }
    return std::make_unique<tcp::TcpFabric>(context, addresses, is_bound, options);
}

}  // namespace weightsync
