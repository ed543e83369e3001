#include "gpu_memory.hpp"

#include <unistd.h>

#include <algorithm>
#include <filesystem>

#include <weightsync/error.hpp>

namespace weightsync::verbs {

DmaBuf export_dmabuf(const cuda::Driver& driver, std::uint64_t address, std::uint64_t nbytes) {
    DmaBuf result;
    if (driver.mem_get_handle_for_address_range == nullptr) {
        result.problem = "the GPU's driver is older than CUDA 11.7";
        return result;
    }
    const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
    const std::uint64_t begin = address / page * page;
    const std::uint64_t end = (address + nbytes + page - 1) / page * page;
    int fd = -1;
    const int error =
        driver.mem_get_handle_for_address_range(&fd, begin, end - begin, cuda::kRangeDmaBuf, 0);
    if (error != 0 || fd < 0) {
        result.problem = "the GPU's driver exports none (" + cuda::result_text(driver, error) +
                         "): its open kernel modules do";
        return result;
    }
    result.fd = UniqueFd(fd);
    result.offset = address - begin;
    return result;
}

bool has_peermem(const std::string& sysfs) {
    std::error_code error;
    const auto modules = std::filesystem::path(sysfs) / "module";
    return std::filesystem::exists(modules / "nvidia_peermem", error) ||
           std::filesystem::exists(modules / "nv_peer_mem", error);  // its name before CUDA 11.4
}

void GpuFlush::add(const cuda::Driver& driver, std::uint64_t address) {
    if (!cuda::is_gpu_memory(driver, address)) {
        return;
    }
    int device = 0;
    int ordering = 0;
    if (driver.pointer_get_attribute(&device, cuda::kPointerDevice, address) == 0 &&
        driver.device_get_attribute(&ordering, cuda::kDeviceWritesOrdering, device) == 0 &&
        ordering >= cuda::kOrderedForOwner) {
        return;
    }
    void* context = nullptr;
    if (const int error = driver.pointer_get_attribute(&context, cuda::kPointerContext, address);
        error != 0 || context == nullptr || driver.flush_gpu_direct_rdma_writes == nullptr) {
        throw Error(Scope::kMemory,
                    "a NIC's writes to this GPU's memory could not be made readable: " +
                        (driver.flush_gpu_direct_rdma_writes == nullptr
                             ? std::string("its driver is older than CUDA 11.3")
                             : cuda::result_text(driver, error)));
    }
    driver_ = &driver;
    if (std::ranges::find(contexts_, context) == contexts_.end()) {
        contexts_.push_back(context);
    }
}

void GpuFlush::run() const {
    for (void* context : contexts_) {
        int error = driver_->ctx_push_current(context);
        if (error == 0) {
            error = driver_->flush_gpu_direct_rdma_writes(cuda::kFlushCurrent, cuda::kFlushToOwner);
            void* popped = nullptr;
            driver_->ctx_pop_current(&popped);
        }
        if (error != 0) {
            throw Error(Scope::kMemory,
                        "cuFlushGPUDirectRDMAWrites: " + cuda::result_text(*driver_, error));
        }
    }
}

}  // namespace weightsync::verbs
