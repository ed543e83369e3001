// RC connections over libibverbs: one rail per NIC port, rendezvous over TCP.
#include "verbs.hpp"

#include <algorithm>

#include "remote.hpp"

namespace weightsync::verbs {

namespace {

constexpr std::size_t kMaxRails = 64;

// "rxe0" or "mlx5_0:1": the port that was asked for. Throws kConfig naming what there is.
const PortFacts& find_port(const std::vector<PortFacts>& ports, const std::string& name) {
    std::string found;
    for (const PortFacts& port : ports) {
        const std::string full = port.device + ":" + std::to_string(port.port);
        if (name == full || (name == port.device && port.port == 1)) {
            return port;
        }
        found += (found.empty() ? "" : ", ") + full;
    }
    throw Error(Scope::kConfig, "there is no RDMA port " + name + "; there are " +
                                    (found.empty() ? "none" : found));
}

std::vector<PortFacts> choose_ports(const VerbsOptions& options) {
    const std::vector<PortFacts> all = list_ports(options.sysfs);
    std::vector<PortFacts> chosen;
    if (options.devices.empty()) {
        std::ranges::copy_if(all, std::back_inserter(chosen),
                             [](const PortFacts& port) { return port.is_active; });
    }
    for (const std::string& name : options.devices) {
        const PortFacts& port = find_port(all, name);
        if (std::ranges::any_of(chosen, [&](const PortFacts& other) {
                return other.device == port.device && other.port == port.port;
            })) {
            throw Error(Scope::kConfig, "the RDMA port " + name + " is given twice");
        }
        chosen.push_back(port);
    }
    if (chosen.empty()) {
        throw Error(Scope::kConfig,
                    all.empty() ? "no RDMA device on this host (/sys/class/infiniband is empty)"
                                : "no RDMA port of this host is active; see `weightsync doctor`");
    }
    if (chosen.size() > kMaxRails) {
        throw Error(Scope::kConfig, std::to_string(chosen.size()) + " RDMA ports; at most " +
                                        std::to_string(kMaxRails));
    }
    return chosen;
}

class VerbsFabric final : public Fabric {
  public:
    VerbsFabric(EngineContext& context, const VerbsOptions& options)
        : context_(context), reactor_("ws-verbs-ctl") {
        const Table& table = options.table == nullptr ? system_table() : *options.table;
        std::vector<net::Address> addresses;
        for (const std::string& host : options.addresses) {
            addresses.push_back(net::Address::parse(host, 0));
        }
        if (addresses.empty()) {
            addresses.push_back(net::Address::parse("127.0.0.1", 0));
        }
        listener_ = std::make_unique<net::Listener>(context_, reactor_, std::move(addresses));
        std::vector<std::shared_ptr<ProtectionDomain>> domains;
        for (const PortFacts& port : choose_ports(options)) {
            rails_.push_back(std::make_unique<Rail>(table, port, options.path, options.memory,
                                                    static_cast<int>(rails_.size())));
            domains.push_back(rails_.back()->domain());
        }
        memory_ = std::make_shared<LocalMemory>(
            domains.size(),
            [domains](std::size_t rail, std::uint64_t address,
                      std::uint64_t nbytes) -> LocalMemory::Registration {
                auto region = std::make_shared<Registration>(domains[rail], address, nbytes,
                                                             Registration::Access::kReadLocally);
                const std::uint64_t lkey = region->lkey();
                return {std::move(region), lkey};
            });
    }
    ~VerbsFabric() override { stop(); }

    [[nodiscard]] std::string_view name() const noexcept override { return "verbs"; }

    [[nodiscard]] std::shared_ptr<TargetPort> export_target(TargetSpec spec) override {
        auto target =
            std::make_shared<VerbsTarget>(context_, reactor_, *listener_, rails_, std::move(spec));
        target->serve();
        return target;
    }

    [[nodiscard]] std::shared_ptr<RemotePort> connect(std::span<const std::byte> bytes,
                                                      const Deadline& deadline) override {
        const Descriptor descriptor = Descriptor::decode(bytes);
        memory_->follow(context_.leases);
        net::Hello hello;
        hello.kind = net::LinkKind::kControl;
        hello.target_id = descriptor.target_id;
        hello.generation = descriptor.generation;
        hello.session = random_u64();
        const net::Patience patience{deadline, nullptr};
        std::optional<Error> failure;
        for (const auto& [host, port] : descriptor.addresses) {
            const net::Address to = net::Address::parse(host, port);
            const std::string label = "verbs " + to.text();
            UniqueFd socket;
            try {
                socket = net::dial(to, std::nullopt, hello, descriptor.key, label, patience);
            } catch (const Error& error) {
                if (error.scope() != Scope::kPeer) {
                    throw;
                }
                failure = error;  // perhaps it can be reached by another address
                continue;
            }
            auto remote = std::make_shared<VerbsRemote>(reactor_, rails_, std::move(socket), label,
                                                        descriptor.generation);
            remote->connect(memory_, patience);
            const std::lock_guard lock(mutex_);
            std::erase_if(remotes_, [](const auto& known) { return known.expired(); });
            remotes_.push_back(remote);
            return remote;
        }
        throw *failure;
    }

    [[nodiscard]] std::vector<RailInfo> rails() override {
        std::vector<RailInfo> infos;
        for (std::size_t i = 0; i < rails_.size(); ++i) {
            RailInfo info;
            const Port& port = rails_[i]->port();
            info.name = rails_[i]->name();
            info.address = gid_text({port.sgid_index, port.gid, GidType::kRoceV2});
            info.state = state_of(i);
            RailCounts& counts = rails_[i]->counts();
            info.bytes_out = counts.bytes_out.load(std::memory_order_relaxed);
            info.bytes_in = counts.bytes_in.load(std::memory_order_relaxed);
            info.outstanding = counts.outstanding.load(std::memory_order_relaxed);
            infos.push_back(std::move(info));
        }
        return infos;
    }

    void stop() noexcept override {
        memory_->unfollow(context_.leases);
        reactor_.stop();
        listener_.reset();
        for (const auto& rail : rails_) {
            rail->stop();
        }
    }

  private:
    [[nodiscard]] std::string state_of(std::size_t rail) const {
        if (!rails_[rail]->is_up()) {
            return "down";
        }
        std::string_view worst = "idle";
        const std::lock_guard lock(mutex_);
        for (const auto& known : remotes_) {
            if (const auto remote = known.lock()) {
                worst = worse_state(worst, remote->state_of(rail));
            }
        }
        return std::string(worst);
    }

    EngineContext& context_;
    // Before those that are watched on it.
    net::Reactor reactor_;
    std::unique_ptr<net::Listener> listener_;
    Rails rails_;
    std::shared_ptr<LocalMemory> memory_;
    mutable std::mutex mutex_;
    std::vector<std::weak_ptr<VerbsRemote>> remotes_;
};

}  // namespace

}  // namespace weightsync::verbs

namespace weightsync {

std::unique_ptr<Fabric> make_verbs_fabric(EngineContext& context, const VerbsOptions& options) {
    return std::make_unique<verbs::VerbsFabric>(context, options);
}

}  // namespace weightsync
