#include "gpu_memory.hpp"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <mutex>

#include <weightsync/error.hpp>

namespace weightsync::verbs {

namespace {

// Of cuda.h; the driver's binary interface keeps them.
constexpr int kPointerContext = 1;          // CU_POINTER_ATTRIBUTE_CONTEXT
constexpr int kPointerMemoryType = 2;       // CU_POINTER_ATTRIBUTE_MEMORY_TYPE
constexpr int kPointerIsManaged = 8;        // CU_POINTER_ATTRIBUTE_IS_MANAGED
constexpr int kPointerDevice = 9;           // CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
constexpr unsigned kMemoryTypeDevice = 2;   // CU_MEMORYTYPE_DEVICE
constexpr int kRangeDmaBuf = 1;             // CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD
constexpr int kDeviceWritesOrdering = 118;  // ..._ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING
constexpr int kOrderedForOwner = 100;       // ..._WRITES_ORDERING_OWNER
constexpr int kFlushCurrent = 0, kFlushOwner = 100;  // ..._TARGET_CURRENT_CTX, ..._TO_OWNER

bool fill(GpuDriver& driver) {
    void* library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    if (library == nullptr) {
        return false;
    }
    const auto look_up = [&](const char* name, auto*& function) {
        function =
            reinterpret_cast<std::remove_reference_t<decltype(function)>>(::dlsym(library, name));
        return function != nullptr;
    };
    look_up("cuMemGetHandleForAddressRange", driver.mem_get_handle_for_address_range);
    look_up("cuFlushGPUDirectRDMAWrites", driver.flush_gpu_direct_rdma_writes);
    return look_up("cuPointerGetAttribute", driver.pointer_get_attribute) &&
           look_up("cuDeviceGetAttribute", driver.device_get_attribute) &&
           look_up("cuCtxPushCurrent_v2", driver.ctx_push_current) &&
           look_up("cuCtxPopCurrent_v2", driver.ctx_pop_current);
}

std::string result_text(int result) {
    return "CUDA error " + std::to_string(result);
}

}  // namespace

const GpuDriver* loaded_gpu_driver() {
    // Asked again until it is there: torch may load it after the engine was opened.
    static std::mutex mutex;
    static GpuDriver driver;
    static bool is_filled = false;
    const std::lock_guard lock(mutex);
    is_filled = is_filled || fill(driver);
    return is_filled ? &driver : nullptr;
}

bool is_gpu_memory(const GpuDriver& driver, std::uint64_t address) {
    unsigned type = 0;
    unsigned is_managed = 0;
    // Fails for what it does not know: memory of the host.
    return driver.pointer_get_attribute(&type, kPointerMemoryType, address) == 0 &&
           type == kMemoryTypeDevice &&
           (driver.pointer_get_attribute(&is_managed, kPointerIsManaged, address) != 0 ||
            is_managed == 0);
}

DmaBuf export_dmabuf(const GpuDriver& driver, std::uint64_t address, std::uint64_t nbytes) {
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
        driver.mem_get_handle_for_address_range(&fd, begin, end - begin, kRangeDmaBuf, 0);
    if (error != 0 || fd < 0) {
        result.problem = "the GPU's driver exports none (" + result_text(error) +
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

void GpuFlush::add(const GpuDriver& driver, std::uint64_t address) {
    if (!is_gpu_memory(driver, address)) {
        return;
    }
    int device = 0;
    int ordering = 0;
    if (driver.pointer_get_attribute(&device, kPointerDevice, address) == 0 &&
        driver.device_get_attribute(&ordering, kDeviceWritesOrdering, device) == 0 &&
        ordering >= kOrderedForOwner) {
        return;
    }
    void* context = nullptr;
    if (const int error = driver.pointer_get_attribute(&context, kPointerContext, address);
        error != 0 || context == nullptr || driver.flush_gpu_direct_rdma_writes == nullptr) {
        throw Error(Scope::kMemory,
                    "a NIC's writes to this GPU's memory could not be made readable: " +
                        (driver.flush_gpu_direct_rdma_writes == nullptr
                             ? std::string("its driver is older than CUDA 11.3")
                             : result_text(error)));
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
            error = driver_->flush_gpu_direct_rdma_writes(kFlushCurrent, kFlushOwner);
            void* popped = nullptr;
            driver_->ctx_pop_current(&popped);
        }
        if (error != 0) {
            throw Error(Scope::kMemory, "cuFlushGPUDirectRDMAWrites: " + result_text(error));
        }
    }
}

}  // namespace weightsync::verbs
