// The sink's end: opens the sources' allocations and copies from them.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "../local/pull_memory.hpp"
#include "context.hpp"
#include "exports.hpp"
#include "regions.hpp"

namespace weightsync::cuda_ipc {

// A source's allocation, open in this process while this lives.
class Import : Counted<Kind::kMapping> {
  public:
    // Throws nothing: `result` tells. In the source's own process nothing is to be opened.
    Import(std::shared_ptr<const Context> context, const Allocation& allocation, bool is_own,
           int& result) noexcept;
    ~Import();
    Import(const Import&) = delete;
    Import& operator=(const Import&) = delete;

    [[nodiscard]] bool is_of(const Allocation& allocation) const noexcept {
        return allocation.base == allocation_.base && allocation.id == allocation_.id &&
               allocation.nbytes == allocation_.nbytes;
    }
    [[nodiscard]] std::uint64_t base() const noexcept { return allocation_.base; }
    [[nodiscard]] Region region() const noexcept {
        return {allocation_.base, allocation_.nbytes, address_};
    }

  private:
    std::shared_ptr<const Context> context_;
    Allocation allocation_;
    std::uint64_t address_ = 0;  // in this process
    bool is_open_ = false;
};

class GpuImports final : public local::Imports {
  public:
    std::vector<std::shared_ptr<const Import>> all;  // by base
    Regions regions;
};

class GpuSinkMemory final : public local::SinkMemory {
  public:
    // Throws kMemory.
    GpuSinkMemory(const cuda::Driver& driver, const TargetSpec& spec);
    ~GpuSinkMemory() override;
    GpuSinkMemory(const GpuSinkMemory&) = delete;
    GpuSinkMemory& operator=(const GpuSinkMemory&) = delete;

    [[nodiscard]] std::uint64_t unit_bytes() const noexcept override;
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
    [[nodiscard]] int take_lane(Lane& lane) noexcept;
    void give_back(const Lane& lane) noexcept;
    // Starts or does the copy of as many bytes as lie in one place on either side. Returns how
    // many these are; with an error they are not copied.
    [[nodiscard]] std::uint64_t copy(Lane& lane, const local::PeerId& peer, const Regions& sources,
                                     const local::Span& span, int& error);
    [[nodiscard]] int copy_by_bounce(Lane& lane, const local::PeerId& peer,
                                     const local::Span& span);

    const cuda::Driver& driver_;
    Regions gpu_;  // of the target
    std::shared_ptr<const Context> context_;
    std::mutex mutex_;
    std::vector<Lane> idle_;
};

}  // namespace weightsync::cuda_ipc
