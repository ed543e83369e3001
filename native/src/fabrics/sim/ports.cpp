// The ports and the fabric of the sim: thin, all decisions are the wire's.
#include <algorithm>

#include <weightsync/codec.hpp>

#include "wire.hpp"

namespace weightsync::sim {

std::vector<std::byte> SimTarget::descriptor() const {
    ByteWriter writer;
    return writer.put(wire_.id()).put(id_).put(spec_.generation).take();
}

void SimTarget::fence(bool /*discard*/) {
    wire_.close_target(*this);
}

void SimTarget::flush() {
    wire_.flush(*this);
}

void SimTarget::close() noexcept {
    wire_.close_target(*this);
}

namespace {

class SimRemote final : public RemotePort {
  public:
    SimRemote(EngineContext& context, std::shared_ptr<Wire> wire, std::shared_ptr<SimTarget> target,
              std::shared_ptr<RemoteInfo> info)
        : engine_(context.name),
          wire_(std::move(wire)),
          target_(std::move(target)),
          info_(std::move(info)) {}

    [[nodiscard]] const std::shared_ptr<RemoteInfo>& info() const noexcept override {
        return info_;
    }

    void post(std::shared_ptr<Operation> operation) override {
        auto transfer = std::make_shared<Transfer>();
        transfer->num_left = operation->rows().size();
        transfer->operation = std::move(operation);
        transfer->target = target_;
        transfer->engine = engine_;
        // Until it is on the wire: one that a close() overlooked would outlive its engine there.
        std::unique_lock lock(mutex_);
        if (is_closed_) {
            lock.unlock();
            transfer->operation->finish(closed_error());
            return;
        }
        std::erase_if(in_flight_, [](const auto& known) { return known.expired(); });
        in_flight_.push_back(transfer);
        wire_->post(transfer);
    }

    void notify(std::span<const std::int32_t> /*immediates*/) override {
        throw Error(Scope::kConfig, "nothing of " + info_->peer + " is mapped here");
    }

    void close() noexcept override {
        std::vector<std::shared_ptr<Transfer>> transfers;
        {
            const std::lock_guard lock(mutex_);
            is_closed_ = true;
            for (const auto& known : in_flight_) {
                if (auto transfer = known.lock()) {
                    transfers.push_back(std::move(transfer));
                }
            }
        }
        wire_->cancel(transfers, closed_error());
    }

  private:
    [[nodiscard]] Error closed_error() const {
        return Error(
            Scope::kTransfer,
            "the remote to " + info_->peer + " was closed while an operation was in flight",
            Facts{{"peer", info_->peer}});
    }

    std::string engine_;
    std::shared_ptr<Wire> wire_;
    std::shared_ptr<SimTarget> target_;
    std::shared_ptr<RemoteInfo> info_;
    std::mutex mutex_;
    std::vector<std::weak_ptr<Transfer>> in_flight_;
    bool is_closed_ = false;
};

class SimFabric final : public Fabric {
  public:
    SimFabric(EngineContext& context, std::shared_ptr<Wire> wire)
        : context_(context), wire_(std::move(wire)) {}
    ~SimFabric() override { stop(); }

    [[nodiscard]] std::string_view name() const noexcept override { return "sim"; }
    [[nodiscard]] std::shared_ptr<TargetPort> export_target(TargetSpec spec) override {
        return wire_->add_target(context_, std::move(spec));
    }
    [[nodiscard]] std::shared_ptr<RemotePort> connect(std::span<const std::byte> descriptor,
                                                      const Deadline& deadline) override;
    [[nodiscard]] bool wait(WakeWord& /*word*/, const std::function<bool()>& ready,
                            const Deadline& deadline) override {
        return wire_->wait(ready, deadline);
    }
    [[nodiscard]] bool is_driven() const noexcept override { return true; }
    bool drive() override { return wire_->step(); }
    void stop() noexcept override {
        if (!is_stopped_) {
            is_stopped_ = true;
            wire_->detach(context_.name);
        }
    }

  private:
    EngineContext& context_;
    std::shared_ptr<Wire> wire_;
    bool is_stopped_ = false;
};

std::shared_ptr<RemotePort> SimFabric::connect(std::span<const std::byte> descriptor,
                                               const Deadline& /*deadline*/) {
    ByteReader reader(descriptor);
    const auto wire_id = reader.get<std::uint64_t>();
    const auto target_id = reader.get<std::uint64_t>();
    const auto generation = reader.get<std::uint64_t>();
    reader.expect_end();
    if (wire_id != wire_->id()) {
        throw Error(Scope::kConfig, "descriptor is of another simulated wire");
    }
    auto target = wire_->find_target(target_id);
    if (!target) {
        throw Error(Scope::kFenced, "the target of generation " + std::to_string(generation) +
                                        " is gone; use the next one");
    }
    auto info = std::make_shared<RemoteInfo>();
    info->peer = "sim " + target->engine();
    info->generation = generation;
    info->chunk_bits = target->spec().slots->chunk_bits();
    info->ranges = target->spec().ranges;
    return std::make_shared<SimRemote>(context_, wire_, std::move(target), std::move(info));
}

}  // namespace

std::unique_ptr<Fabric> Wire::attach(EngineContext& context) {
    {
        const std::lock_guard lock(mutex_);
        if (!engines_.insert(context.name).second) {
            throw Error(Scope::kConfig,
                        "an engine named '" + context.name + "' is already attached to this wire");
        }
    }
    return std::make_unique<SimFabric>(context, shared_from_this());
}

}  // namespace weightsync::sim
