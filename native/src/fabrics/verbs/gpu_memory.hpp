// GPU memory, as far as a NIC has to know of it: which addresses are a GPU's, how the driver hands
// them to other devices, and how what a NIC placed there becomes readable.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include <weightsync/os.hpp>

namespace weightsync::verbs {

// Functions of the CUDA driver: of libcuda.so.1, or of a test. Each returns 0 or a CUresult.
struct GpuDriver {
    int (*pointer_get_attribute)(void* data, int attribute, std::uint64_t pointer) = nullptr;
    int (*device_get_attribute)(int* value, int attribute, int device) = nullptr;
    int (*ctx_push_current)(void* context) = nullptr;
    int (*ctx_pop_current)(void** context) = nullptr;
    // Null in drivers before CUDA 11.7 and 11.3.
    int (*mem_get_handle_for_address_range)(void* handle, std::uint64_t pointer, std::size_t nbytes,
                                            int type, unsigned long long flags) = nullptr;
    int (*flush_gpu_direct_rdma_writes)(int target, int scope) = nullptr;
};

// Of the driver that this process has loaded; null while it has none, and then it has no memory of
// a GPU. Never loads it.
[[nodiscard]] const GpuDriver* loaded_gpu_driver();

// What is allocated on a GPU; memory that the driver moves between hosts and GPUs is not.
[[nodiscard]] bool is_gpu_memory(const GpuDriver& driver, std::uint64_t address);

// Memory as a dma-buf, which other devices' drivers understand.
struct DmaBuf {
    UniqueFd fd;               // of whole pages; empty when it cannot be had
    std::uint64_t offset = 0;  // of the address in it
    std::string problem;       // why it cannot be had
};
[[nodiscard]] DmaBuf export_dmabuf(const GpuDriver& driver, std::uint64_t address,
                                   std::uint64_t nbytes);

// Whether the module by which NICs reach GPU memory without a dma-buf is loaded. `sysfs`: "/sys".
[[nodiscard]] bool has_peermem(const std::string& sysfs);

// Makes what NICs placed in memory of GPUs readable for kernels that are launched afterwards.
// Nothing for GPUs that see to it themselves, and for host memory.
class GpuFlush {
  public:
    // Memory of the host is ignored.
    void add(const GpuDriver& driver, std::uint64_t address);
    [[nodiscard]] bool is_needed() const noexcept { return !contexts_.empty(); }
    // Throws kMemory.
    void run() const;

  private:
    const GpuDriver* driver_ = nullptr;
    std::vector<void*> contexts_;  // of the driver, one per GPU
};

}  // namespace weightsync::verbs
