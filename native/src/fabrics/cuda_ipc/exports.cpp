#include "exports.hpp"

#include <chrono>
#include <cstring>

#include "context.hpp"

namespace weightsync::cuda_ipc {

void Exports::follow(LeaseTable& leases) {
    const std::lock_guard lock(follow_mutex_);
    if (is_following_) {
        return;
    }
    leases.set_registrar(Registry::kProcesses,
                         [self = shared_from_this()](std::uint64_t address, std::uint64_t nbytes) {
                             return self->enroll(address, nbytes);
                         });
    is_following_ = true;
}

std::shared_ptr<const local::Notes> Exports::notes() const {
    const std::lock_guard lock(mutex_);
    return notes_;
}

void Exports::add(std::weak_ptr<local::Announcer> announcer) {
    const std::lock_guard lock(mutex_);
    std::erase_if(announcers_, [](const auto& known) { return known.expired(); });
    announcers_.push_back(std::move(announcer));
}

std::shared_ptr<void> Exports::enroll(std::uint64_t address, std::uint64_t nbytes) {
    if (!cuda::is_gpu_memory(driver_, address)) {
        return nullptr;
    }
    const Extent extent = extent_of(driver_, address, nbytes);
    Allocation allocation;
    allocation.base = extent.base;
    allocation.nbytes = extent.nbytes;
    check(driver_, driver_.device_get_uuid(&allocation.device, extent.device), "cuDeviceGetUuid");
    const auto context = Context::retain(driver_, extent.device);
    const Current current(*context);
    check(driver_, current.result(), "cuCtxPushCurrent");
    check(driver_,
          driver_.pointer_get_attribute(&allocation.id, cuda::kPointerBufferId, extent.base),
          "cuPointerGetAttribute(BUFFER_ID)");
    if (const int result = driver_.ipc_get_mem_handle(&allocation.handle, extent.base);
        result != 0) {
        throw Error(Scope::kMemory,
                    std::to_string(nbytes) + " bytes of GPU " + std::to_string(extent.device) +
                        " at address " + std::to_string(address) +
                        " cannot be shared with other processes: cuIpcGetMemHandle: " +
                        cuda::result_text(driver_, result) +
                        "; memory of cudaMalloc can, torch's expandable segments cannot: set "
                        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False");
    }
    const std::lock_guard lock(mutex_);
    Entry& entry = entries_[extent.base];
    const bool is_new = entry.num_leases == 0 || entry.allocation.id != allocation.id;
    entry.allocation = allocation;
    ++entry.num_leases;
    if (is_new) {
        publish();
    }
    // What it points to is never looked at.
    return {this, [self = shared_from_this(), base = extent.base](Exports* /*exports*/) noexcept {
                self->remove(base);
            }};
}

void Exports::remove(std::uint64_t base) noexcept {
    {
        const std::lock_guard lock(mutex_);
        const auto found = entries_.find(base);
        if (found == entries_.end() || --found->second.num_leases != 0) {
            return;
        }
        entries_.erase(found);
        publish();
    }
    announce();
}

void Exports::announce() noexcept {
    std::vector<std::weak_ptr<local::Announcer>> announcers;
    {
        const std::lock_guard lock(mutex_);
        announcers = announcers_;
    }
    const auto end = std::chrono::steady_clock::now() + local::kPatience;
    for (const auto& known : announcers) {
        if (const auto announcer = known.lock()) {
            announcer->announce(end);
        }
    }
}

void Exports::publish() {
    auto notes = std::make_shared<local::Notes>();
    notes->version = ++version_;
    notes->bytes.resize(entries_.size() * sizeof(Allocation));
    std::byte* at = notes->bytes.data();
    for (const auto& [base, entry] : entries_) {
        std::memcpy(at, &entry.allocation, sizeof(Allocation));
        at += sizeof(Allocation);
    }
    notes_ = std::move(notes);
}

}  // namespace weightsync::cuda_ipc
