#include "sink_memory.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace weightsync::cuda_ipc {

using local::Pulled;
using local::Span;

namespace {

constexpr std::uint64_t kBounceBytes = std::uint64_t{4} << 20;

// As Pulled's.
int to_error(int result) noexcept {
    return -result;
}

}  // namespace

Import::Import(std::shared_ptr<const Context> context, const Allocation& allocation, bool is_own,
               int& result) noexcept
    : context_(std::move(context)), allocation_(allocation), address_(allocation.base) {
    const cuda::Driver& driver = context_->driver();
    const Current current(*context_);
    result = current.result();
    if (result == 0 && !is_own) {
        result = driver.ipc_open_mem_handle(&address_, allocation.handle, cuda::kIpcLazyPeerAccess);
        is_open_ = result == 0;
    }
    // The peer says how long it is; the driver knows.
    std::uint64_t base = 0;
    std::size_t nbytes = 0;
    if (result == 0) {
        result = driver.mem_get_address_range(&base, &nbytes, address_);
    }
    if (result == 0 && (base != address_ || nbytes < allocation.nbytes)) {
        constexpr int kInvalidValue = 1;
        result = kInvalidValue;
    }
}

Import::~Import() {
    if (is_open_) {
        const Current current(*context_);
        context_->driver().ipc_close_mem_handle(address_);
    }
}

GpuSinkMemory::GpuSinkMemory(const cuda::Driver& driver, const TargetSpec& spec) : driver_(driver) {
    std::vector<Region> regions;
    int device = 0;  // of a target that lies on the host: any GPU can copy there
    for (const ExportedRange& range : spec.exported) {
        if (range.nbytes == 0 || !cuda::is_gpu_memory(driver, range.address)) {
            continue;
        }
        const Extent extent = extent_of(driver, range.address);
        if (regions.empty()) {
            device = extent.device;
        }
        if (std::ranges::find(regions, extent.base, &Region::begin) == regions.end()) {
            regions.push_back({extent.base, extent.nbytes, extent.base});
        }
    }
    if (!gpu_.assign(std::move(regions))) {
        throw Error(Scope::kInternal, "allocations of a GPU overlap");
    }
    context_ = std::make_shared<const Context>(driver, device);
}

GpuSinkMemory::~GpuSinkMemory() {
    const Current current(*context_);
    for (const Lane& lane : idle_) {
        driver_.stream_destroy(lane.stream);
        if (lane.bounce != nullptr) {
            driver_.mem_free_host(lane.bounce);
        }
    }
}

std::uint64_t GpuSinkMemory::unit_bytes() const noexcept {
    // A copy inside a GPU is over in less time than it takes to hear of it: 64 MiB are 30 us there,
    // 1.3 ms at the 50 GB/s of a PCIe 5 slot.
    return std::uint64_t{64} << 20;
}

local::SinkMemory::Opened GpuSinkMemory::open(const local::PeerId& peer,
                                              std::span<const std::byte> notes,
                                              const std::shared_ptr<const local::Imports>& before) {
    if (notes.size() % sizeof(Allocation) != 0) {
        return {nullptr, EINVAL};
    }
    const auto* known = static_cast<const GpuImports*>(before.get());
    auto opened = std::make_shared<GpuImports>();
    std::vector<Region> regions;
    for (std::size_t at = 0; at < notes.size(); at += sizeof(Allocation)) {
        Allocation allocation;
        std::memcpy(&allocation, notes.data() + at, sizeof(allocation));
        std::shared_ptr<const Import> import;
        if (known != nullptr) {
            const auto found =
                std::ranges::lower_bound(known->all, allocation.base, {}, &Import::base);
            if (found != known->all.end() && (*found)->is_of(allocation)) {
                import = *found;
            }
        }
        if (!import) {
            int result = 0;
            import = std::make_shared<const Import>(context_, allocation, peer.pid == ::getpid(),
                                                    result);
            if (result != 0) {
                return {nullptr, to_error(result)};
            }
        }
        regions.push_back(import->region());
        opened->all.push_back(std::move(import));
    }
    std::ranges::sort(opened->all, {}, &Import::base);
    if (!opened->regions.assign(std::move(regions))) {
        return {nullptr, EINVAL};
    }
    return {std::move(opened), 0};
}

Pulled GpuSinkMemory::pull(const local::PeerId& peer, const local::Imports* imports,
                           std::span<const Span> spans) noexcept {
    static const Regions kNone;
    const Regions& sources =
        imports == nullptr ? kNone : static_cast<const GpuImports*>(imports)->regions;
    if (sources.empty() && gpu_.empty()) {
        return local::pull_from_host(peer.pid, spans);
    }
    const Current current(*context_);
    Lane lane;
    int error = to_error(current.result());
    if (error == 0) {
        error = to_error(take_lane(lane));
    }
    std::size_t num_spans = 0;
    while (error == 0 && num_spans < spans.size()) {
        Span left = spans[num_spans];
        while (error == 0 && left.nbytes != 0) {
            const std::uint64_t nbytes = copy(lane, peer, sources, left, error);
            left = {left.to + nbytes, left.from + nbytes, left.nbytes - nbytes};
        }
        num_spans += error == 0 ? 1 : 0;
    }
    if (lane.stream != nullptr) {
        // Also after an error: nothing may be written once this returns.
        if (const int result = driver_.stream_synchronize(lane.stream); result != 0) {
            num_spans = 0;
            error = to_error(result);
        }
        give_back(lane);
    }
    return {num_spans, 0, error};
}

std::uint64_t GpuSinkMemory::copy(Lane& lane, const local::PeerId& peer, const Regions& sources,
                                  const Span& span, int& error) {
    const Place to = gpu_.find(span.to);
    const Place from = sources.find(span.from);
    const Span part{span.to, span.from, std::min({span.nbytes, to.nbytes, from.nbytes})};
    if (from.is_gpu) {
        // Also to memory of the host: addresses are unique among all of them.
        error = to_error(driver_.memcpy_async(to.address, from.address, part.nbytes, lane.stream));
    } else if (to.is_gpu) {
        error = copy_by_bounce(lane, peer, part);
    } else {
        error = local::pull_from_host(peer.pid, std::span(&part, 1)).error;
    }
    return part.nbytes;
}

int GpuSinkMemory::copy_by_bounce(Lane& lane, const local::PeerId& peer, const Span& span) {
    if (lane.bounce == nullptr) {
        if (const int result =
                driver_.mem_host_alloc(&lane.bounce, kBounceBytes, cuda::kHostPortable);
            result != 0) {
            lane.bounce = nullptr;
            return to_error(result);
        }
    }
    const auto bounce = reinterpret_cast<std::uint64_t>(lane.bounce);
    for (std::uint64_t offset = 0; offset < span.nbytes; offset += kBounceBytes) {
        const std::uint64_t nbytes = std::min(kBounceBytes, span.nbytes - offset);
        // What the buffer held before is on its way until here.
        if (const int result = driver_.stream_synchronize(lane.stream); result != 0) {
            return to_error(result);
        }
        const Span part{bounce, span.from + offset, nbytes};
        if (const int error = local::pull_from_host(peer.pid, std::span(&part, 1)).error;
            error != 0) {
            return error;
        }
        if (const int result = driver_.memcpy_async(span.to + offset, bounce, nbytes, lane.stream);
            result != 0) {
            return to_error(result);
        }
    }
    return 0;
}

int GpuSinkMemory::take_lane(Lane& lane) noexcept {
    {
        const std::lock_guard lock(mutex_);
        if (!idle_.empty()) {
            lane = idle_.back();
            idle_.pop_back();
            return 0;
        }
    }
    return driver_.stream_create(&lane.stream, cuda::kStreamNonBlocking);
}

void GpuSinkMemory::give_back(const Lane& lane) noexcept {
    const std::lock_guard lock(mutex_);
    idle_.push_back(lane);
}

}  // namespace weightsync::cuda_ipc
