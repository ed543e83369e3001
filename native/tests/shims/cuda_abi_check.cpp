// Compiled, never run: src/cuda/driver.hpp against the header of the CUDA toolkit.
#include <cuda.h>

#include <type_traits>

#include "../../src/cuda/driver.hpp"

namespace weightsync::cuda {
namespace {

// How the ABI of a 64-bit machine passes an argument: enums as int, handles as pointers.
template <class T>
struct Passed {
    using type = T;
};
template <class T>
    requires std::is_enum_v<T>
struct Passed<T> {
    using type = int;
};
template <>
struct Passed<CUdeviceptr> {
    using type = std::uint64_t;
};
template <>
struct Passed<CUipcMemHandle> {
    using type = IpcHandle;
};
template <class T>
    requires std::is_class_v<T>
struct Passed<T*> {
    using type = void*;  // CUcontext, CUstream
};
template <class T>
    requires(!std::is_class_v<T> && !std::is_function_v<T>)
struct Passed<T*> {
    using type = typename Passed<T>::type*;
};
template <>
struct Passed<CUipcMemHandle*> {
    using type = IpcHandle*;
};
template <>
struct Passed<CUuuid*> {
    using type = Uuid*;
};
template <>
struct Passed<const char*> {
    using type = const char*;
};
template <class Result, class... Arguments>
struct Passed<Result (*)(Arguments...)> {
    using type = typename Passed<Result>::type (*)(typename Passed<Arguments>::type...);
};

template <class Member, class Function>
constexpr bool fits(Member Driver::* /*member*/, Function* /*function*/) {
    static_assert(std::is_same_v<Member, typename Passed<Function*>::type>);
    return true;
}

static_assert(sizeof(CUipcMemHandle) == sizeof(IpcHandle) &&
              alignof(CUipcMemHandle) == alignof(IpcHandle));
static_assert(sizeof(CUuuid) == sizeof(Uuid) && alignof(CUuuid) == alignof(Uuid));
static_assert(sizeof(CUdeviceptr) == sizeof(std::uint64_t) && std::is_integral_v<CUdeviceptr>);
static_assert(std::is_same_v<CUdevice, int>);

// The names with their versions are those that driver.cpp looks up.
static_assert(fits(&Driver::pointer_get_attribute, &cuPointerGetAttribute));
static_assert(fits(&Driver::device_get_attribute, &cuDeviceGetAttribute));
static_assert(fits(&Driver::ctx_push_current, &cuCtxPushCurrent_v2));
static_assert(fits(&Driver::ctx_pop_current, &cuCtxPopCurrent_v2));
static_assert(fits(&Driver::mem_get_handle_for_address_range, &cuMemGetHandleForAddressRange));
static_assert(fits(&Driver::flush_gpu_direct_rdma_writes, &cuFlushGPUDirectRDMAWrites));
static_assert(fits(&Driver::init, &cuInit));
static_assert(fits(&Driver::device_get_count, &cuDeviceGetCount));
static_assert(fits(&Driver::get_error_name, &cuGetErrorName));
static_assert(fits(&Driver::device_get_uuid, &cuDeviceGetUuid_v2));
static_assert(fits(&Driver::thread_exchange_stream_capture_mode,
                   &cuThreadExchangeStreamCaptureMode));
static_assert(fits(&Driver::device_primary_ctx_retain, &cuDevicePrimaryCtxRetain));
static_assert(fits(&Driver::device_primary_ctx_release, &cuDevicePrimaryCtxRelease_v2));
static_assert(fits(&Driver::mem_get_address_range, &cuMemGetAddressRange_v2));
static_assert(fits(&Driver::ipc_get_mem_handle, &cuIpcGetMemHandle));
static_assert(fits(&Driver::ipc_open_mem_handle, &cuIpcOpenMemHandle_v2));
static_assert(fits(&Driver::ipc_close_mem_handle, &cuIpcCloseMemHandle));
static_assert(fits(&Driver::mem_host_alloc, &cuMemHostAlloc));
static_assert(fits(&Driver::mem_free_host, &cuMemFreeHost));
static_assert(fits(&Driver::stream_create, &cuStreamCreate));
static_assert(fits(&Driver::stream_destroy, &cuStreamDestroy_v2));
static_assert(fits(&Driver::stream_synchronize, &cuStreamSynchronize));
static_assert(fits(&Driver::memcpy_async, &cuMemcpyAsync));

static_assert(kPointerContext == CU_POINTER_ATTRIBUTE_CONTEXT);
static_assert(kPointerMemoryType == CU_POINTER_ATTRIBUTE_MEMORY_TYPE);
static_assert(kPointerBufferId == CU_POINTER_ATTRIBUTE_BUFFER_ID);
static_assert(kPointerIsManaged == CU_POINTER_ATTRIBUTE_IS_MANAGED);
static_assert(kPointerDevice == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL);
static_assert(kMemoryTypeDevice == CU_MEMORYTYPE_DEVICE);
static_assert(kRangeDmaBuf == CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD);
static_assert(kDeviceWritesOrdering == CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING);
static_assert(kOrderedForOwner == CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER);
static_assert(kFlushCurrent == CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX);
static_assert(kFlushToOwner == CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER);
static_assert(kInvalidValue == CUDA_ERROR_INVALID_VALUE);
static_assert(kPeerAccessUnsupported == CUDA_ERROR_PEER_ACCESS_UNSUPPORTED);
static_assert(kCaptureRelaxed == CU_STREAM_CAPTURE_MODE_RELAXED);
static_assert(kStreamNonBlocking == CU_STREAM_NON_BLOCKING);
static_assert(kIpcLazyPeerAccess == CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
static_assert(kHostPortable == CU_MEMHOSTALLOC_PORTABLE);

}  // namespace
}  // namespace weightsync::cuda
