#include "driver.hpp"

#include <dlfcn.h>

#include <mutex>
#include <type_traits>

#include <weightsync/error.hpp>

namespace weightsync::cuda {

namespace {

constexpr const char* kLibrary = "libcuda.so.1";

// False when a function that every driver of the last years has is missing.
bool fill(Driver& driver, void* library) {
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
           look_up("cuCtxPopCurrent_v2", driver.ctx_pop_current) &&
           look_up("cuInit", driver.init) && look_up("cuDeviceGetCount", driver.device_get_count) &&
           look_up("cuGetErrorName", driver.get_error_name) &&
           look_up("cuDeviceGetUuid_v2", driver.device_get_uuid) &&
           look_up("cuThreadExchangeStreamCaptureMode",
                   driver.thread_exchange_stream_capture_mode) &&
           look_up("cuDevicePrimaryCtxRetain", driver.device_primary_ctx_retain) &&
           look_up("cuDevicePrimaryCtxRelease_v2", driver.device_primary_ctx_release) &&
           look_up("cuMemGetAddressRange_v2", driver.mem_get_address_range) &&
           look_up("cuIpcGetMemHandle", driver.ipc_get_mem_handle) &&
           look_up("cuIpcOpenMemHandle_v2", driver.ipc_open_mem_handle) &&
           look_up("cuIpcCloseMemHandle", driver.ipc_close_mem_handle) &&
           look_up("cuMemHostAlloc", driver.mem_host_alloc) &&
           look_up("cuMemFreeHost", driver.mem_free_host) &&
           look_up("cuStreamCreate", driver.stream_create) &&
           look_up("cuStreamDestroy_v2", driver.stream_destroy) &&
           look_up("cuStreamSynchronize", driver.stream_synchronize) &&
           look_up("cuMemcpyAsync", driver.memcpy_async);
}

// Never closed: the driver leaves threads behind.
const Driver* find(int flags) {
    // Asked again until it is there: torch may load it after the engine was opened.
    static std::mutex mutex;
    static Driver driver;
    static bool is_filled = false;
    const std::lock_guard lock(mutex);
    if (!is_filled) {
        void* const library = ::dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL | flags);
        is_filled = library != nullptr && fill(driver, library);
    }
    return is_filled ? &driver : nullptr;
}

}  // namespace

const Driver* loaded_driver() {
    return find(RTLD_NOLOAD);
}

const Driver& load_driver() {
    const Driver* const driver = find(0);
    if (driver == nullptr) {
        throw Error(Scope::kConfig,
                    "this host has no driver of an NVIDIA GPU (libcuda.so.1, CUDA 11 or newer); "
                    "fabric 'local' moves memory of the host");
    }
    int num_devices = 0;
    int result = driver->init(0);
    if (result == 0) {
        result = driver->device_get_count(&num_devices);
    }
    if (result != 0 || num_devices == 0) {
        throw Error(Scope::kConfig,
                    "this process sees no GPU (" +
                        (result == 0 ? "none is visible" : result_text(*driver, result)) +
                        "); check nvidia-smi and CUDA_VISIBLE_DEVICES");
    }
    return *driver;
}

bool is_gpu_memory(const Driver& driver, std::uint64_t address) {
    unsigned type = 0;
    unsigned is_managed = 0;
    // Fails for what it does not know: memory of the host.
    return driver.pointer_get_attribute(&type, kPointerMemoryType, address) == 0 &&
           type == kMemoryTypeDevice &&
           (driver.pointer_get_attribute(&is_managed, kPointerIsManaged, address) != 0 ||
            is_managed == 0);
}

std::string result_text(const Driver& driver, int result) {
    const char* name = nullptr;
    std::string text = "CUDA error " + std::to_string(result);
    if (driver.get_error_name != nullptr && driver.get_error_name(result, &name) == 0) {
        text += std::string(" (") + name + ")";
    }
    return text;
}

}  // namespace weightsync::cuda
