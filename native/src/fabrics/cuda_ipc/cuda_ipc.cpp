// Fabric cuda_ipc: fabric local whose pulls also reach memory of GPUs. Only the sink's own threads
// copy, so a fence is the closed gate of fabric local, and a writer that lives on cannot write.
#include "../local/local.hpp"
#include "sink_memory.hpp"

namespace weightsync {

namespace {

class GpuMemory final : public local::PullMemory {
  public:
    explicit GpuMemory(const cuda::Driver& driver)
        : driver_(driver),
          exports_(std::make_shared<cuda_ipc::Exports>(driver)),
          imports_(std::make_shared<cuda_ipc::ImportTable>()) {}

    // A source's processor cannot copy from its GPU's memory.
    [[nodiscard]] bool can_push() const noexcept override { return false; }
    void follow(LeaseTable& leases) override { exports_->follow(leases); }
    void unfollow(LeaseTable& leases) noexcept override {
        leases.set_registrar(Registry::kProcesses, nullptr);
    }
    void add(std::weak_ptr<local::Announcer> announcer) override {
        exports_->add(std::move(announcer));
    }
    [[nodiscard]] std::shared_ptr<const local::Notes> notes() const override {
        return exports_->notes();
    }
    [[nodiscard]] std::shared_ptr<local::SinkMemory> sink_memory(const TargetSpec& spec) override {
        return std::make_shared<cuda_ipc::GpuSinkMemory>(driver_, imports_, spec);
    }
    [[nodiscard]] std::string error_text(int error) const override {
        if (error >= 0) {
            return local::host_error_text(error);
        }
        const bool is_of_peers = -error == cuda::kPeerAccessUnsupported;
        return cuda::result_text(driver_, -error) +
               (is_of_peers ? "; the two GPUs cannot reach each other: nvidia-smi topo -p2p r"
                            : "");
    }

  private:
    const cuda::Driver& driver_;
    std::shared_ptr<cuda_ipc::Exports> exports_;
    std::shared_ptr<cuda_ipc::ImportTable> imports_;
};

}  // namespace

std::unique_ptr<Fabric> make_cuda_ipc_fabric(EngineContext& context, const LocalOptions& options) {
    return local::make_fabric(context, "cuda_ipc", options,
                              std::make_unique<GpuMemory>(cuda::load_driver()));
}

}  // namespace weightsync
