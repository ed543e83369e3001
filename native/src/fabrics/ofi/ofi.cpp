// The fabric over libfabric: reliable datagram endpoints that write into registered memory with an
// immediate as remote CQ data. Rails meet over TCP (src/net), where keys of regions travel.
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <optional>
#include <set>

#include <weightsync/fabrics.hpp>

#include "../../net/dial.hpp"
#include "remote.hpp"
#include "shm_files.hpp"
#include "target.hpp"

namespace weightsync::ofi {

namespace {

bool is_in(const std::string& provider, std::string_view name) {
    return provider.find(name) != std::string::npos;
}

// Rails of these are named by their device, those of the others by an IP address.
bool has_devices(const std::string& provider) {
    return is_in(provider, "efa") || is_in(provider, "shm");
}

std::vector<net::Address> parse_addresses(const OfiOptions& options) {
    std::vector<net::Address> addresses;
    for (const std::string& text : options.addresses) {
        addresses.push_back(net::Address::parse(text, 0));
    }
    if (addresses.empty()) {
        throw Error(Scope::kConfig, "give at least one address of this host");
    }
    // Whoever reaches an endpoint and guesses a key can write: libfabric authenticates nobody.
    const bool is_local = is_in(options.provider, "shm") ||
                          (!is_in(options.provider, "efa") &&
                           std::ranges::all_of(addresses, &net::Address::is_loopback));
    if (!is_local && !options.is_trusted_network) {
        throw Error(Scope::kConfig,
                    "provider " + options.provider +
                        " does not authenticate who writes, so it stays on loopback; use "
                        "trusted_network=True where only trusted hosts reach this network, or the "
                        "tcp fabric");
    }
    return addresses;
}

// The one to take. `tcp` must not be layered under ofi_rxm: in release 1.17 a connection that ends
// in the middle of a message, as every fence of a busy target does, crashes that layer. There the
// provider `net` is what later releases call `tcp`.
Info choose_info(const InfoRequest& request) {
    const auto is_layered = [](const Info& info) {
        return is_in(info->fabric_attr->prov_name, "ofi_rxm");
    };
    std::vector<Info> infos = find_infos(request);
    if (request.provider != "tcp") {
        return infos.front();
    }
    auto plain = std::ranges::find_if_not(infos, is_layered);
    if (plain == infos.end()) {
        infos = find_infos({"net", request.address, request.domain, ""});
        plain = std::ranges::find_if_not(infos, is_layered);
    }
    if (plain == infos.end()) {
        throw Error(Scope::kConfig,
                    "this libfabric offers tcp only below ofi_rxm, which cannot be fenced; use a "
                    "newer one, or the tcp fabric");
    }
    return *plain;
}

std::vector<std::shared_ptr<Domain>> open_domains(const OfiOptions& options) {
    std::vector<Info> infos;
    if (is_in(options.provider, "shm")) {
        sweep_shm_files();
        infos.push_back(find_infos({options.provider, "", "", make_shm_name()}).front());
    } else if (has_devices(options.provider)) {
        std::set<std::string> known;
        for (Info& info : find_infos({options.provider, "", "", ""})) {
            const std::string name = info->domain_attr->name;
            const bool is_wanted =
                options.domains.empty() ||
                std::ranges::find(options.domains, name) != options.domains.end();
            if (is_wanted && known.insert(name).second) {
                infos.push_back(std::move(info));
            }
        }
        if (infos.empty() || known.size() < options.domains.size()) {
            throw Error(Scope::kConfig, "provider " + options.provider +
                                            " has not all of the devices that were asked for; "
                                            "see `fi_info -p " +
                                            options.provider + "`");
        }
    } else {
        if (!options.domains.empty() && options.domains.size() != options.addresses.size()) {
            throw Error(Scope::kConfig, "give one address for each of the domains");
        }
        for (std::size_t i = 0; i < options.addresses.size(); ++i) {
            const std::string domain = options.domains.empty() ? "" : options.domains[i];
            infos.push_back(choose_info({options.provider, options.addresses[i], domain, ""}));
        }
    }
    std::vector<std::shared_ptr<Domain>> domains;
    for (Info& info : infos) {
        domains.push_back(std::make_shared<Domain>(std::move(info)));
    }
    return domains;
}

class OfiFabric final : public Fabric {
  public:
    OfiFabric(EngineContext& context, const OfiOptions& options)
        : context_(context),
          name_("ofi:" + options.provider),
          reactor_("ws-accept"),
          listener_(context, reactor_, parse_addresses(options)) {
        std::vector<std::shared_ptr<Domain>> domains;
        for (auto& domain : open_domains(options)) {
            const bool is_needed = options.registers_sources || domain->needs_local_regions();
            domains.push_back(is_needed ? domain : nullptr);
            rails_.push_back(std::make_shared<Rail>(std::move(domain),
                                                    "ws-ofi" + std::to_string(rails_.size())));
        }
        if (std::ranges::all_of(domains, [](const auto& domain) { return domain == nullptr; })) {
            return;
        }
        memory_ = std::make_shared<LocalMemory>(
            domains.size(),
            [domains](std::size_t rail, std::uint64_t address,
                      std::uint64_t nbytes) -> LocalMemory::Registration {
                if (!domains[rail]) {
                    return {};
                }
                auto region =
                    std::make_shared<Region>(domains[rail], address, nbytes, abi::FI_WRITE);
                const auto desc = reinterpret_cast<std::uint64_t>(region->desc());
                return {std::move(region), desc};
            });
    }
    ~OfiFabric() override { stop(); }

    [[nodiscard]] std::string_view name() const noexcept override { return name_; }
    [[nodiscard]] std::shared_ptr<TargetPort> export_target(TargetSpec spec) override {
        auto target =
            std::make_shared<OfiTarget>(context_, reactor_, listener_, rails_, std::move(spec));
        target->start();
        return target;
    }
    [[nodiscard]] std::shared_ptr<RemotePort> connect(std::span<const std::byte> descriptor,
                                                      const Deadline& deadline) override;
    [[nodiscard]] std::vector<RailInfo> rails() override {
        std::vector<RailInfo> infos;
        for (std::size_t i = 0; i < rails_.size(); ++i) {
            const Rail& rail = *rails_[i];
            const std::uint64_t out = rail.bytes_out.load();
            infos.push_back({.name = "ofi" + std::to_string(i),
                             .address = rail.domain()->label(),
                             .state = state_of(i),
                             .bytes_out = out,
                             .bytes_in = rail.bytes_in.load(),
                             .outstanding = out - std::min(out, rail.bytes_done.load())});
        }
        return infos;
    }
    void stop() noexcept override {
        if (memory_) {
            memory_->unfollow(context_.leases);
        }
        reactor_.stop();
        for (const auto& rail : rails_) {
            rail->stop();
        }
        if (name_ == "ofi:shm") {
            sweep_shm_files();  // of peers that were killed meanwhile
        }
    }

  private:
    [[nodiscard]] std::string state_of(std::size_t rail);
    [[nodiscard]] static UniqueFd dial(const Descriptor& sink, const net::Hello& hello,
                                       const std::string& label, const Deadline& deadline);

    EngineContext& context_;
    const std::string name_;
    net::Reactor reactor_;
    net::Listener listener_;
    std::vector<std::shared_ptr<Rail>> rails_;
    std::shared_ptr<LocalMemory> memory_;  // null where no provider wants it
    std::mutex mutex_;
    std::vector<std::weak_ptr<OfiRemote>> remotes_;
};

// The worst state of a path over it; a rail that only receives is active.
std::string OfiFabric::state_of(std::size_t rail) {
    std::vector<std::shared_ptr<OfiRemote>> remotes;
    {
        const std::lock_guard lock(mutex_);
        for (const auto& known : remotes_) {
            if (auto remote = known.lock()) {
                remotes.push_back(std::move(remote));
            }
        }
    }
    std::string_view worst = rails_[rail]->is_idle() ? "idle" : "active";
    for (const auto& remote : remotes) {
        worst = worse_state(worst, remote->state_of(rail));
    }
    return std::string(worst);
}

// Over the first address that answers.
UniqueFd OfiFabric::dial(const Descriptor& sink, const net::Hello& hello, const std::string& label,
                         const Deadline& deadline) {
    constexpr std::chrono::seconds kDialTime{5};
    std::optional<Error> first;
    for (std::size_t i = 0; i < sink.endpoints.size(); ++i) {
        const bool is_last = i + 1 == sink.endpoints.size();
        const auto share = std::chrono::duration<double>(deadline.remaining(kDialTime)) / 2;
        const net::Patience patience{is_last ? deadline : Deadline::after(share.count())};
        try {
            return net::dial(sink.endpoints[i], std::nullopt, hello, sink.key, label, patience);
        } catch (const Error& error) {
            const Scope scope = error.scope();
            if (scope != Scope::kPeer && scope != Scope::kRail && scope != Scope::kTimeout) {
                throw;
            }
            if (!first || scope == Scope::kTimeout) {
                first = error;
            }
        }
    }
    throw Error(*first);
}

std::shared_ptr<RemotePort> OfiFabric::connect(std::span<const std::byte> descriptor,
                                               const Deadline& deadline) {
    const Descriptor sink = Descriptor::decode(descriptor);
    const net::Address& endpoint = sink.endpoints.front();
    const net::Patience patience{deadline};
    if (memory_) {
        memory_->follow(context_.leases);
    }
    auto info = std::make_shared<RemoteInfo>();
    info->peer = name_ + " pid " + std::to_string(sink.pid) + " at " + endpoint.text();
    info->generation = sink.generation;
    net::Hello hello;
    hello.kind = net::LinkKind::kControl;
    hello.target_id = sink.target_id;
    hello.generation = sink.generation;
    hello.session = random_u64();
    auto channel = std::make_unique<net::Channel>(dial(sink, hello, info->peer, deadline));
    TargetReader reader;
    for (bool is_whole = false; !is_whole;) {
        const net::Frame frame = channel->next(patience, info->peer);
        const auto type = static_cast<FrameType>(frame.type);
        if (type == FrameType::kFenced || type == FrameType::kClosed) {
            throw Error(Scope::kFenced,
                        info->peer + " has just closed its target; use the next one",
                        {{"peer", info->peer}});
        }
        is_whole = reader.take(frame.type, frame.payload);
    }
    const TargetView view = reader.finish();
    info->chunk_bits = view.chunk_bits;
    std::vector<Range> ranges;
    for (const RangeFrame& range : view.ranges) {
        ranges.push_back({range.arena_offset, range.nbytes, 0});
    }
    info->ranges = RangeTable(std::move(ranges));
    auto remote =
        std::make_shared<OfiRemote>(reactor_, rails_, memory_, std::move(info), std::move(channel));
    remote->start(view, deadline);
    const std::lock_guard lock(mutex_);
    std::erase_if(remotes_, [](const auto& known) { return known.expired(); });
    remotes_.push_back(remote);
    return remote;
}

}  // namespace

}  // namespace weightsync::ofi

namespace weightsync {

std::unique_ptr<Fabric> make_ofi_fabric(EngineContext& context, const OfiOptions& options) {
    return std::make_unique<ofi::OfiFabric>(context, options);
}

}  // namespace weightsync
