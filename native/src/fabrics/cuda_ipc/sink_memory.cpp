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

GpuSinkMemory::GpuSinkMemory(const cuda::Driver& driver, std::shared_ptr<ImportTable> table,
                             const TargetSpec& spec)
    : driver_(driver), table_(std::move(table)) {
    std::vector<Region> regions;
    for (const ExportedRange& range : spec.exported) {
        if (range.nbytes == 0 || !cuda::is_gpu_memory(driver, range.address)) {
            continue;
        }
        const Extent extent = extent_of(driver, range.address, range.nbytes);
        if (!context_) {
            context_ = Context::retain(driver, extent.device);
        }
        if (std::ranges::find(regions, extent.base, &Region::begin) == regions.end()) {
            regions.push_back({extent.base, extent.nbytes, extent.base});
        }
    }
    if (!gpu_.assign(std::move(regions))) {
        throw Error(Scope::kInternal, "allocations of a GPU overlap");
    }
}

GpuSinkMemory::~GpuSinkMemory() {
    if (!context_) {
        return;
    }
    const Current current(*context_);
    for (const Lane& lane : idle_) {
        driver_.stream_destroy(lane.stream);
        if (lane.bounce != nullptr) {
            driver_.mem_free_host(lane.bounce);
        }
    }
}

std::uint64_t GpuSinkMemory::unit_bytes(const local::Imports* imports) const noexcept {
    const auto* gpu = static_cast<const GpuImports*>(imports);
    const bool is_between_gpus = !gpu_.empty() && gpu != nullptr && !gpu->regions.empty();
    // Inside a GPU a copy of 64 MiB takes 30 us, as long as it takes to start it and to hear of
    // it; over the 50 GB/s of a PCIe 5 slot 1.3 ms. A host copies 5 to 10 GB/s.
    return std::uint64_t{is_between_gpus ? 64U : 4U} << 20;
}

std::shared_ptr<const Context> GpuSinkMemory::context_for(const Allocation& allocation,
                                                          int& result) {
    const std::lock_guard lock(mutex_);
    if (context_) {
        return context_;
    }
    int count = 0;
    int device = 0;  // if the source's is not visible here
    result = driver_.device_get_count(&count);
    for (int i = 0; i < count; ++i) {
        cuda::Uuid uuid{};
        if (driver_.device_get_uuid(&uuid, i) == 0 && uuid.bytes == allocation.device.bytes) {
            device = i;
        }
    }
    context_ = Context::try_retain(driver_, device, result);
    return context_;
}

local::SinkMemory::Opened GpuSinkMemory::open(const local::PeerId& peer,
                                              std::span<const std::byte> notes,
                                              const std::shared_ptr<const local::Imports>& before) {
    std::vector<Allocation> named(notes.size() / sizeof(Allocation));
    if (notes.size() != named.size() * sizeof(Allocation)) {
        return {nullptr, EINVAL};
    }
    if (!named.empty()) {
        std::memcpy(named.data(), notes.data(), notes.size());
    }
    std::ranges::sort(named, {}, &Allocation::base);
    std::vector<Region> regions;
    for (const Allocation& allocation : named) {
        regions.push_back({allocation.base, allocation.nbytes, 0});
    }
    auto opened = std::make_shared<GpuImports>();
    if (!opened->regions.assign(regions)) {
        return {nullptr, EINVAL};
    }
    const auto* known = static_cast<const GpuImports*>(before.get());
    opened->all.resize(named.size());
    // What is gone goes first: the source may be about to free it, and what is new may lie there.
    for (std::size_t i = 0; known != nullptr && i < known->all.size(); ++i) {
        const auto& import = known->all[i];
        const auto same =
            std::ranges::lower_bound(named, import->allocation().base, {}, &Allocation::base);
        if (same != named.end() && import->is_of(*same) && import->is_open()) {
            opened->all[static_cast<std::size_t>(same - named.begin())] = import;
        } else {
            import->close();
        }
    }
    for (std::size_t i = 0; i < named.size(); ++i) {
        std::shared_ptr<Import>& import = opened->all[i];
        if (!import) {
            table_->close_stale(peer.pid, named[i]);
            int result = 0;
            auto context = context_for(named[i], result);
            if (context) {
                import =
                    std::make_shared<Import>(std::move(context), named[i], peer.pid == ::getpid());
                result = import->open();
            }
            if (result != 0) {
                return {nullptr, to_error(result)};
            }
            table_->add(peer.pid, import);
        }
        regions[i].address = import->address();
    }
    if (!opened->regions.assign(std::move(regions))) {
        return {nullptr, EINVAL};
    }
    return {std::move(opened), 0};
}

Pulled GpuSinkMemory::pull(const local::PeerId& peer, const local::Imports* imports,
                           std::span<const Span> spans) noexcept {
    const auto* gpu = static_cast<const GpuImports*>(imports);
    if (gpu_.empty() && (gpu == nullptr || gpu->regions.empty())) {
        return local::pull_from_host(peer.pid, spans);
    }
    // Set before there was anything to import, or memory of a GPU.
    const Current current(*context_);
    Reading reading{peer, gpu, {}, {}};
    if (gpu != nullptr) {
        reading.uses.resize(gpu->all.size());
    }
    int error = to_error(current.result());
    if (error == 0) {
        error = to_error(take_lane(reading.lane));
    }
    std::size_t num_spans = 0;
    while (error == 0 && num_spans < spans.size()) {
        Span left = spans[num_spans];
        while (error == 0 && left.nbytes != 0) {
            error = copy(reading, left);
        }
        num_spans += error == 0 ? 1 : 0;
    }
    if (reading.lane.stream != nullptr) {
        // Also after an error: nothing may be written once this returns.
        if (const int result = driver_.stream_synchronize(reading.lane.stream); result != 0) {
            num_spans = 0;
            error = to_error(result);
        }
        give_back(reading.lane);
    }
    return {num_spans, 0, error};
}

int GpuSinkMemory::copy(Reading& reading, Span& span) {
    const Place to = gpu_.find(span.to);
    Place from{false, span.from, UINT64_MAX};
    if (reading.imports != nullptr) {
        from = reading.imports->regions.find(span.from);
    }
    const Span part{span.to, span.from, std::min({span.nbytes, to.nbytes, from.nbytes})};
    if (part.nbytes == 0) {
        return EFAULT;  // behind the last address
    }
    span = {span.to + part.nbytes, span.from + part.nbytes, span.nbytes - part.nbytes};
    if (from.is_gpu) {
        auto& use = reading.uses[from.region];
        const Import& import = *reading.imports->all[from.region];
        if (!use.owns_lock()) {
            use = import.use();
        }
        if (!import.is_open()) {
            return EFAULT;  // the source has freed it
        }
        // Also to memory of the host: addresses are unique among all of them.
        return to_error(
            driver_.memcpy_async(to.address, from.address, part.nbytes, reading.lane.stream));
    }
    return to.is_gpu ? copy_by_bounce(reading, part)
                     : local::pull_from_host(reading.peer.pid, std::span(&part, 1)).error;
}

int GpuSinkMemory::copy_by_bounce(Reading& reading, const Span& span) {
    Lane& lane = reading.lane;
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
        if (const int error = local::pull_from_host(reading.peer.pid, std::span(&part, 1)).error;
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
