// libcuda.so.1 for machines without a GPU: one device whose memory is a memfd behind addresses that
// no processor may touch, so that whoever treats them as memory of the host crashes as with a GPU.
// Copies happen when their stream is waited for, and not before. Addresses that were freed come
// again at once; opening what lies where something stale is open, and freeing what another process
// has open, are errors. Signatures are the toolkit's.
//
//   fake_cuda_alias(address)            where the bytes of device memory are, for tests
//   fake_cuda_fail(name, result, skip)  the function fails once, after `skip` calls that do not
//   fake_cuda_live()                    allocations, imports, streams and retained contexts
#include <cuda.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#pragma GCC visibility push(default)

namespace {

struct Handle {
    int pid;
    int fd;
    std::uint64_t base;
    std::uint64_t id;
    std::uint64_t nbytes;
};

// The last page of a memfd: the processes that have it open. One that was killed has nothing open.
struct Shared {
    std::array<std::atomic<int>, 64> pids;

    void add(int pid) {
        for (auto& entry : pids) {
            int none = 0;
            if (entry.compare_exchange_strong(none, pid)) {
                return;
            }
        }
    }
    void remove(int pid) {
        for (auto& entry : pids) {
            int expected = pid;
            if (entry.compare_exchange_strong(expected, 0)) {
                return;
            }
        }
    }
    bool is_open() const {
        return std::any_of(pids.begin(), pids.end(), [](const std::atomic<int>& pid) {
            return pid.load() != 0 && ::kill(pid.load(), 0) == 0;
        });
    }
};
static_assert(sizeof(Handle) <= sizeof(CUipcMemHandle));

struct Allocation {
    std::uint64_t nbytes = 0;
    std::uint64_t mapped = 0;  // whole pages
    Shared* shared = nullptr;
    std::uint64_t id = 0;
    int fd = -1;
    char* alias = nullptr;
    Handle origin{};    // of an import
    int num_opens = 0;  // of an import
};

struct Copy {
    char* to;
    const char* from;
    std::size_t nbytes;
};
struct Stream {
    std::vector<Copy> copies;
};

struct Fault {
    CUresult result;
    int skip;
};

std::mutex mutex;
std::map<std::uint64_t, Allocation> allocations;  // by device address
std::map<std::string, Fault> faults;
std::uint64_t next_id = 1;
int num_streams = 0;
int num_contexts = 0;
bool is_initialized = false;
int the_context = 0;  // its address is the handle
thread_local std::vector<CUcontext> current;

// What a call answers before it does anything.
CUresult begin(const char* name, bool needs_context) {
    const std::lock_guard lock(mutex);
    if (!is_initialized) {
        return CUDA_ERROR_NOT_INITIALIZED;
    }
    if (const auto fault = faults.find(name); fault != faults.end()) {
        if (fault->second.skip-- == 0) {
            const CUresult result = fault->second.result;
            faults.erase(fault);
            return result;
        }
    }
    return needs_context && current.empty() ? CUDA_ERROR_INVALID_CONTEXT : CUDA_SUCCESS;
}

std::map<std::uint64_t, Allocation>::iterator find(std::uint64_t address) {
    auto next = allocations.upper_bound(address);
    if (next == allocations.begin()) {
        return allocations.end();
    }
    const auto found = std::prev(next);
    return address - found->first < found->second.nbytes ? found : allocations.end();
}

constexpr std::uint64_t kPage = 4096;

// Freed addresses, by mapped size: the next allocation of that size gets the same, as with a GPU.
std::multimap<std::uint64_t, std::uint64_t> free_addresses;

CUresult map_memory(int fd, std::uint64_t nbytes, Allocation& made, std::uint64_t& address) {
    made.mapped = (nbytes + kPage - 1) / kPage * kPage;
    void* const alias =
        ::mmap(nullptr, made.mapped + kPage, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (alias == MAP_FAILED) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    if (const auto freed = free_addresses.find(made.mapped); freed != free_addresses.end()) {
        address = freed->second;
        free_addresses.erase(freed);
    } else {
        // A page more on either side, or neighbours would be one run of addresses.
        void* const device = ::mmap(nullptr, made.mapped + 2 * kPage, PROT_NONE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (device == MAP_FAILED) {
            return CUDA_ERROR_OUT_OF_MEMORY;
        }
        address = reinterpret_cast<std::uint64_t>(device) + kPage;
    }
    made.nbytes = nbytes;
    made.fd = fd;
    made.alias = static_cast<char*>(alias);
    made.shared = reinterpret_cast<Shared*>(made.alias + made.mapped);
    return CUDA_SUCCESS;
}

void unmap(std::map<std::uint64_t, Allocation>::iterator found) {
    ::munmap(found->second.alias, found->second.mapped + kPage);
    free_addresses.emplace(found->second.mapped, found->first);
    ::close(found->second.fd);
    allocations.erase(found);
}

// Where the bytes of an address are; null if they leave their allocation.
char* bytes_at(std::uint64_t address, std::size_t nbytes) {
    const auto found = find(address);
    if (found == allocations.end()) {
        return reinterpret_cast<char*>(address);
    }
    const std::uint64_t offset = address - found->first;
    return nbytes > found->second.nbytes - offset ? nullptr : found->second.alias + offset;
}

CUresult copy_now(std::uint64_t to, std::uint64_t from, std::size_t nbytes) {
    char* const target = bytes_at(to, nbytes);
    const char* const source = bytes_at(from, nbytes);
    if (target == nullptr || source == nullptr) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    std::memcpy(target, source, nbytes);
    return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

void* fake_cuda_alias(std::uint64_t address) {
    const std::lock_guard lock(mutex);
    const auto found = find(address);
    return found == allocations.end() ? nullptr : found->second.alias + (address - found->first);
}
void fake_cuda_fail(const char* name, int result, int skip) {
    const std::lock_guard lock(mutex);
    faults[name] = {static_cast<CUresult>(result), skip};
}
int fake_cuda_live() {
    const std::lock_guard lock(mutex);
    return static_cast<int>(allocations.size()) + num_streams + num_contexts;
}

CUresult cuInit(unsigned /*flags*/) {
    const std::lock_guard lock(mutex);
    is_initialized = true;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* count) {
    *count = 1;
    return begin("cuDeviceGetCount", false);
}
CUresult cuGetErrorName(CUresult error, const char** name) {
    *name = error == CUDA_ERROR_PEER_ACCESS_UNSUPPORTED ? "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED"
                                                        : "CUDA_ERROR_OF_THE_FAKE";
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice device) {
    std::memset(uuid, 0xab, sizeof(*uuid));
    return device == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute /*attribute*/, CUdevice /*device*/) {
    *value = 0;
    return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
    if (const CUresult result = begin("cuPointerGetAttribute", false); result != CUDA_SUCCESS) {
        return result;
    }
    const std::lock_guard lock(mutex);
    const auto found = find(pointer);
    if (found == allocations.end()) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    const auto answer = [data](auto value) {
        std::memcpy(data, &value, sizeof(value));
        return CUDA_SUCCESS;
    };
    switch (attribute) {
        case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
            return answer(unsigned{CU_MEMORYTYPE_DEVICE});
        case CU_POINTER_ATTRIBUTE_BUFFER_ID:
            return answer(found->second.id);
        case CU_POINTER_ATTRIBUTE_IS_MANAGED:
        case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
            return answer(0);
        case CU_POINTER_ATTRIBUTE_CONTEXT:
            return answer(&the_context);
        default:
            return CUDA_ERROR_INVALID_VALUE;
    }
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    const CUresult result = begin("cuDevicePrimaryCtxRetain", false);
    if (result != CUDA_SUCCESS || device != 0) {
        return result != CUDA_SUCCESS ? result : CUDA_ERROR_INVALID_DEVICE;
    }
    *context = reinterpret_cast<CUcontext>(&the_context);
    const std::lock_guard lock(mutex);
    ++num_contexts;
    return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice /*device*/) {
    const std::lock_guard lock(mutex);
    --num_contexts;
    return CUDA_SUCCESS;
}
CUresult cuCtxPushCurrent_v2(CUcontext context) {
    const CUresult result = begin("cuCtxPushCurrent", false);
    if (result == CUDA_SUCCESS) {
        current.push_back(context);
    }
    return result;
}
CUresult cuCtxSetCurrent(CUcontext context) {
    current.assign(1, context);
    return CUDA_SUCCESS;
}
CUresult cuCtxSynchronize() {
    return begin("cuCtxSynchronize", true);
}
CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
    thread_local CUstreamCaptureMode of_thread = CU_STREAM_CAPTURE_MODE_GLOBAL;
    std::swap(*mode, of_thread);
    return CUDA_SUCCESS;
}
CUresult cuCtxPopCurrent_v2(CUcontext* context) {
    if (current.empty()) {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    *context = current.back();
    current.pop_back();
    return CUDA_SUCCESS;
}

CUresult cuMemAlloc_v2(CUdeviceptr* pointer, std::size_t nbytes) {
    if (const CUresult result = begin("cuMemAlloc", true); result != CUDA_SUCCESS) {
        return result;
    }
    const int fd = ::memfd_create("fake-cuda", MFD_CLOEXEC);
    const std::uint64_t file_bytes = (nbytes + kPage - 1) / kPage * kPage + kPage;
    if (fd < 0 || nbytes == 0 || ::ftruncate(fd, static_cast<off_t>(file_bytes)) != 0) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    Allocation made;
    std::uint64_t address = 0;
    const std::lock_guard lock(mutex);
    const CUresult result = map_memory(fd, nbytes, made, address);
    if (result == CUDA_SUCCESS) {
        made.id = next_id++;
        allocations.emplace(address, made);
        *pointer = address;
    }
    return result;
}
CUresult cuMemFree_v2(CUdeviceptr pointer) {
    const std::lock_guard lock(mutex);
    const auto found = allocations.find(pointer);
    if (found == allocations.end() || found->second.num_opens != 0) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (found->second.shared->is_open()) {
        return CUDA_ERROR_UNKNOWN;  // with a GPU: undefined
    }
    unmap(found);
    return CUDA_SUCCESS;
}
CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, std::size_t* nbytes, CUdeviceptr pointer) {
    if (const CUresult result = begin("cuMemGetAddressRange", true); result != CUDA_SUCCESS) {
        return result;
    }
    const std::lock_guard lock(mutex);
    const auto found = find(pointer);
    if (found == allocations.end()) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    *base = found->first;
    *nbytes = found->second.nbytes;
    return CUDA_SUCCESS;
}
CUresult cuMemHostAlloc(void** pointer, std::size_t nbytes, unsigned /*flags*/) {
    if (const CUresult result = begin("cuMemHostAlloc", true); result != CUDA_SUCCESS) {
        return result;
    }
    *pointer = ::operator new(nbytes);
    return CUDA_SUCCESS;
}
CUresult cuMemFreeHost(void* pointer) {
    ::operator delete(pointer);
    return CUDA_SUCCESS;
}

CUresult cuIpcGetMemHandle(CUipcMemHandle* handle, CUdeviceptr pointer) {
    if (const CUresult result = begin("cuIpcGetMemHandle", true); result != CUDA_SUCCESS) {
        return result;
    }
    const std::lock_guard lock(mutex);
    const auto found = allocations.find(pointer);
    if (found == allocations.end() || found->second.num_opens != 0) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    const Handle named{::getpid(), found->second.fd, found->first, found->second.id,
                       found->second.nbytes};
    std::memset(handle, 0, sizeof(*handle));
    std::memcpy(handle, &named, sizeof(named));
    return CUDA_SUCCESS;
}
CUresult cuIpcOpenMemHandle_v2(CUdeviceptr* pointer, CUipcMemHandle handle, unsigned flags) {
    if (const CUresult result = begin("cuIpcOpenMemHandle", true); result != CUDA_SUCCESS) {
        return result;
    }
    Handle named;
    std::memcpy(&named, &handle, sizeof(named));
    if (named.pid == ::getpid() || flags != CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS) {
        return CUDA_ERROR_INVALID_CONTEXT;  // as the driver: not in the process that made it
    }
    const std::lock_guard lock(mutex);
    for (auto& [address, allocation] : allocations) {
        if (allocation.num_opens == 0 || allocation.origin.pid != named.pid) {
            continue;
        }
        if (allocation.origin.id == named.id) {
            ++allocation.num_opens;
            *pointer = address;
            return CUDA_SUCCESS;
        }
        if (allocation.origin.base < named.base + named.nbytes &&
            named.base < allocation.origin.base + allocation.nbytes) {
            return CUDA_ERROR_ALREADY_MAPPED;  // what was there before is open still
        }
    }
    const std::string path =
        "/proc/" + std::to_string(named.pid) + "/fd/" + std::to_string(named.fd);
    const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (fd < 0) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    Allocation made;
    std::uint64_t address = 0;
    const CUresult result = map_memory(fd, named.nbytes, made, address);
    if (result == CUDA_SUCCESS) {
        made.id = next_id++;
        made.origin = named;
        made.num_opens = 1;
        made.shared->add(::getpid());
        allocations.emplace(address, made);
        *pointer = address;
    }
    return result;
}
CUresult cuIpcCloseMemHandle(CUdeviceptr pointer) {
    if (const CUresult result = begin("cuIpcCloseMemHandle", true); result != CUDA_SUCCESS) {
        return result;
    }
    const std::lock_guard lock(mutex);
    const auto found = allocations.find(pointer);
    if (found == allocations.end() || found->second.num_opens == 0) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (--found->second.num_opens == 0) {
        found->second.shared->remove(::getpid());
        unmap(found);
    }
    return CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream* stream, unsigned /*flags*/) {
    if (const CUresult result = begin("cuStreamCreate", true); result != CUDA_SUCCESS) {
        return result;
    }
    *stream = reinterpret_cast<CUstream>(new Stream);
    const std::lock_guard lock(mutex);
    ++num_streams;
    return CUDA_SUCCESS;
}
CUresult cuStreamDestroy_v2(CUstream stream) {
    delete reinterpret_cast<Stream*>(stream);
    const std::lock_guard lock(mutex);
    --num_streams;
    return CUDA_SUCCESS;
}
CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, std::size_t nbytes, CUstream stream) {
    if (const CUresult result = begin("cuMemcpyAsync", true); result != CUDA_SUCCESS) {
        return result;
    }
    const std::lock_guard lock(mutex);
    char* const target = bytes_at(to, nbytes);
    const char* const source = bytes_at(from, nbytes);
    if (target == nullptr || source == nullptr) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    reinterpret_cast<Stream*>(stream)->copies.push_back({target, source, nbytes});
    return CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(CUstream stream) {
    const CUresult result = begin("cuStreamSynchronize", true);
    auto* const queue = reinterpret_cast<Stream*>(stream);
    if (result == CUDA_SUCCESS) {
        for (const Copy& copy : queue->copies) {
            std::memcpy(copy.to, copy.from, copy.nbytes);
        }
    }
    queue->copies.clear();
    return result;
}
CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, std::size_t nbytes) {
    const std::lock_guard lock(mutex);
    return copy_now(to, reinterpret_cast<std::uint64_t>(from), nbytes);
}
CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, std::size_t nbytes) {
    const std::lock_guard lock(mutex);
    return copy_now(reinterpret_cast<std::uint64_t>(to), from, nbytes);
}

}  // extern "C"
