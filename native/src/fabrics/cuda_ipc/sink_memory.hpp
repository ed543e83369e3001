// The sink's end: copies from the sources' allocations.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <vector>

#include "imports.hpp"

namespace weightsync::cuda_ipc {

class GpuSinkMemory final : public local::SinkMemory {
  public:
    // Throws kMemory.
    GpuSinkMemory(const cuda::Driver& driver, std::shared_ptr<ImportTable> table,
                  const TargetSpec& spec);
    ~GpuSinkMemory() override;
    GpuSinkMemory(const GpuSinkMemory&) = delete;
    GpuSinkMemory& operator=(const GpuSinkMemory&) = delete;

    [[nodiscard]] std::uint64_t unit_bytes(const local::Imports* imports) const noexcept override;
    [[nodiscard]] Opened open(const local::PeerId& peer, std::span<const std::byte> notes,
                              const std::shared_ptr<const local::Imports>& before) override;
    [[nodiscard]] local::Pulled pull(const local::PeerId& peer, const local::Imports* imports,
                                     std::span<const local::Span> spans) noexcept override;

  private:
    // What one thread copies with.
    struct Lane {
        void* stream = nullptr;
        void* bounce = nullptr;  // pinned; for what goes from a host to a GPU
    };
    // One pull: who it reads from, and what it keeps open meanwhile.
    struct Reading {
        const local::PeerId& peer;
        const GpuImports* imports;  // or null
        Lane lane;
        std::vector<std::shared_lock<std::shared_mutex>> uses;  // by region; empty: not used yet
    };
    // The context of the target's GPU; where it has none, of the first source's.
    [[nodiscard]] std::shared_ptr<const Context> context_for(const Allocation& allocation,
                                                             int& result);
    [[nodiscard]] int take_lane(Lane& lane) noexcept;
    void give_back(const Lane& lane) noexcept;
    // Starts or does the copy of as many bytes as lie in one place on either side, and takes them
    // off the span. Returns 0, or an error as Pulled's.
    [[nodiscard]] int copy(Reading& reading, local::Span& span);
    [[nodiscard]] int copy_by_bounce(Reading& reading, const local::Span& span);

    const cuda::Driver& driver_;
    const std::shared_ptr<ImportTable> table_;
    Regions gpu_;  // of the target
    std::mutex mutex_;
    std::shared_ptr<const Context> context_;  // null until it is needed; then it stays
    std::vector<Lane> idle_;
};

}  // namespace weightsync::cuda_ipc
