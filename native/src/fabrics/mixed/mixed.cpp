// Two fabrics as one: inside a host the near one, between hosts the far one. Which of them a pair
// of processes uses is found when they connect; from then on the port is that fabric's own.
#include <string>
#include <utility>

#include <weightsync/codec.hpp>
#include <weightsync/fabrics.hpp>

namespace weightsync {

namespace {

// Both ports write the same memory and mark the same board, so that a slot is complete whatever
// way its chunks came.
class MixedTarget final : public TargetPort {
  public:
    MixedTarget(Board board, std::shared_ptr<TargetPort> near, std::shared_ptr<TargetPort> far)
        : board_(std::move(board)), near_(std::move(near)), far_(std::move(far)) {}

    [[nodiscard]] Board& board() noexcept override { return board_; }
    [[nodiscard]] std::vector<std::byte> descriptor() const override {
        const std::vector<std::byte> near = near_->descriptor();
        const std::vector<std::byte> far = far_->descriptor();
        ByteWriter writer;
        writer.put(static_cast<std::uint32_t>(near.size()));
        writer.put(static_cast<std::uint32_t>(far.size()));
        return writer.put_bytes(near).put_bytes(far).take();
    }
    void fence(bool discard) override {
        near_->fence(discard);
        far_->fence(discard);
    }
    void flush() override {
        near_->flush();
        far_->flush();
    }
    void close() noexcept override {
        near_->close();
        far_->close();
    }

  private:
    Board board_;
    std::shared_ptr<TargetPort> near_;
    std::shared_ptr<TargetPort> far_;
};

// Whoever cannot be reached near may be reached far: another host or network namespace, another
// user, or processes that may not read each other's memory.
bool is_elsewhere(const Error& error) noexcept {
    return error.scope() == Scope::kPeer || error.scope() == Scope::kAuth ||
           error.scope() == Scope::kMemory;
}

class MixedFabric final : public Fabric {
  public:
    MixedFabric(EngineContext& context, std::unique_ptr<Fabric> near, std::unique_ptr<Fabric> far)
        : context_(context),
          near_(std::move(near)),
          far_(std::move(far)),
          name_(std::string(near_->name()) + "+" + std::string(far_->name())) {}

    [[nodiscard]] std::string_view name() const noexcept override { return name_; }

    [[nodiscard]] std::shared_ptr<TargetPort> export_target(TargetSpec spec) override {
        spec.shared_board = spec.make_board(context_.progress.event.get());
        const Board board = *spec.shared_board;
        // Near sources are read from, never handed the memory: a fence that put other pages behind
        // its address would take away what the NICs know of it.
        TargetSpec of_near = spec;
        for (ExportedRange& range : of_near.exported) {
            range.block = nullptr;
        }
        std::shared_ptr<TargetPort> near = near_->export_target(std::move(of_near));
        try {
            std::shared_ptr<TargetPort> far = far_->export_target(std::move(spec));
            return std::make_shared<MixedTarget>(board, std::move(near), std::move(far));
        } catch (...) {
            near->close();
            throw;
        }
    }

    [[nodiscard]] std::shared_ptr<RemotePort> connect(std::span<const std::byte> descriptor,
                                                      const Deadline& deadline) override {
        ByteReader reader(descriptor);
        const auto near_bytes = reader.get<std::uint32_t>();
        const auto far_bytes = reader.get<std::uint32_t>();
        const std::span<const std::byte> both = reader.rest();
        if (near_bytes > both.size() || far_bytes != both.size() - near_bytes) {
            throw Error(Scope::kConfig,
                        "descriptor has another length than it says; it is damaged");
        }
        std::string refusal;
        try {
            return near_->connect(both.first(near_bytes), deadline);
        } catch (const Error& error) {
            if (!is_elsewhere(error)) {
                throw;
            }
            refusal = error.detail();
        }
        try {
            return far_->connect(both.subspan(near_bytes), deadline);
        } catch (const Error& error) {
            throw error.with_detail(error.detail() + "; nor over " + std::string(near_->name()) +
                                    ": " + refusal);
        }
    }

    [[nodiscard]] std::vector<RailInfo> rails() override { return far_->rails(); }

    void stop() noexcept override {
        near_->stop();
        far_->stop();
    }

  private:
    EngineContext& context_;
    const std::unique_ptr<Fabric> near_;
    const std::unique_ptr<Fabric> far_;
    const std::string name_;
};

}  // namespace

std::unique_ptr<Fabric> make_mixed_fabric(EngineContext& context, std::unique_ptr<Fabric> near,
                                          std::unique_ptr<Fabric> far) {
    return std::make_unique<MixedFabric>(context, std::move(near), std::move(far));
}

std::unique_ptr<Fabric> make_behind(EngineContext& context, const NearOptions& near,
                                    std::unique_ptr<Fabric> far) {
    if (near.fabric.empty()) {
        return far;
    }
    const LocalOptions options{.num_threads = near.num_threads};
    if (near.fabric == "local") {
        return make_mixed_fabric(context, make_local_fabric(context, options), std::move(far));
    }
    if (near.fabric == "cuda_ipc") {
        return make_mixed_fabric(context, make_cuda_ipc_fabric(context, options), std::move(far));
    }
    throw Error(Scope::kConfig, "no fabric of a host is called '" + near.fabric +
                                    "'; there are local and cuda_ipc");
}

}  // namespace weightsync
