// The CUDA driver as a table of functions that is filled while the program runs: nothing is linked,
// and everything builds where there is no toolkit. tests/shims/cuda_abi_check.cpp holds it against
// the toolkit's header.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace weightsync::cuda {

// Of cuda.h; the driver's binary interface keeps them.
inline constexpr int kPointerContext = 1;          // CU_POINTER_ATTRIBUTE_CONTEXT
inline constexpr int kPointerMemoryType = 2;       // CU_POINTER_ATTRIBUTE_MEMORY_TYPE
inline constexpr int kPointerBufferId = 7;         // CU_POINTER_ATTRIBUTE_BUFFER_ID
inline constexpr int kPointerIsManaged = 8;        // CU_POINTER_ATTRIBUTE_IS_MANAGED
inline constexpr int kPointerDevice = 9;           // CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
inline constexpr unsigned kMemoryTypeDevice = 2;   // CU_MEMORYTYPE_DEVICE
inline constexpr int kRangeDmaBuf = 1;             // CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD
inline constexpr int kDeviceWritesOrdering = 118;  // ..._GPU_DIRECT_RDMA_WRITES_ORDERING
inline constexpr int kOrderedForOwner = 100;       // ..._WRITES_ORDERING_OWNER
inline constexpr int kFlushCurrent = 0;            // ..._RDMA_WRITES_TARGET_CURRENT_CTX
inline constexpr int kFlushToOwner = 100;          // ..._RDMA_WRITES_TO_OWNER
inline constexpr int kCaptureRelaxed = 2;          // CU_STREAM_CAPTURE_MODE_RELAXED
inline constexpr unsigned kStreamNonBlocking = 1;  // CU_STREAM_NON_BLOCKING
inline constexpr unsigned kIpcLazyPeerAccess = 1;  // CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
inline constexpr unsigned kHostPortable = 1;       // CU_MEMHOSTALLOC_PORTABLE

inline constexpr int kInvalidValue = 1;             // CUDA_ERROR_INVALID_VALUE
inline constexpr int kPeerAccessUnsupported = 217;  // CUDA_ERROR_PEER_ACCESS_UNSUPPORTED

// CUipcMemHandle: names an allocation to the other processes of a host.
struct IpcHandle {
    std::array<char, 64> reserved;
};

// CUuuid: of a device, the same in all processes.
struct Uuid {
    std::array<char, 16> bytes;
};

// Functions of libcuda.so.1, or of a test. Each returns 0 or a CUresult. Contexts and streams are
// opaque pointers, devices are ordinals.
struct Driver {
    int (*pointer_get_attribute)(void* data, int attribute, std::uint64_t pointer) = nullptr;
    int (*device_get_attribute)(int* value, int attribute, int device) = nullptr;
    int (*ctx_push_current)(void* context) = nullptr;
    int (*ctx_pop_current)(void** context) = nullptr;
    // Null in drivers before CUDA 11.7 and 11.3.
    int (*mem_get_handle_for_address_range)(void* handle, std::uint64_t pointer, std::size_t nbytes,
                                            int type, std::uint64_t flags) = nullptr;
    int (*flush_gpu_direct_rdma_writes)(int target, int scope) = nullptr;
    // What fabric cuda_ipc needs on top.
    int (*init)(unsigned flags) = nullptr;
    int (*device_get_count)(int* count) = nullptr;
    int (*get_error_name)(int error, const char** name) = nullptr;
    int (*device_get_uuid)(Uuid* uuid, int device) = nullptr;
    int (*thread_exchange_stream_capture_mode)(int* mode) = nullptr;
    int (*device_primary_ctx_retain)(void** context, int device) = nullptr;
    int (*device_primary_ctx_release)(int device) = nullptr;
    int (*mem_get_address_range)(std::uint64_t* base, std::size_t* nbytes,
                                 std::uint64_t pointer) = nullptr;
    int (*ipc_get_mem_handle)(IpcHandle* handle, std::uint64_t pointer) = nullptr;
    int (*ipc_open_mem_handle)(std::uint64_t* pointer, IpcHandle handle, unsigned flags) = nullptr;
    int (*ipc_close_mem_handle)(std::uint64_t pointer) = nullptr;
    int (*mem_host_alloc)(void** pointer, std::size_t nbytes, unsigned flags) = nullptr;
    int (*mem_free_host)(void* pointer) = nullptr;
    int (*stream_create)(void** stream, unsigned flags) = nullptr;
    int (*stream_destroy)(void* stream) = nullptr;
    int (*stream_synchronize)(void* stream) = nullptr;
    int (*memcpy_async)(std::uint64_t destination, std::uint64_t source, std::size_t nbytes,
                        void* stream) = nullptr;
};

// Of the driver that this process has loaded; null while it has none, and then it has no memory of
// a GPU. Never loads it.
[[nodiscard]] const Driver* loaded_driver();

// Loads and initializes it. Throws kConfig when there is no driver, or no GPU.
[[nodiscard]] const Driver& load_driver();

// What is allocated on a GPU; memory that the driver moves between hosts and GPUs is not.
[[nodiscard]] bool is_gpu_memory(const Driver& driver, std::uint64_t address);

// Such as "CUDA error 201 (CUDA_ERROR_INVALID_CONTEXT)".
[[nodiscard]] std::string result_text(const Driver& driver, int result);

}  // namespace weightsync::cuda
