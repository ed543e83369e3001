// GPU memory, as far as a NIC has to know of it: how the driver hands it to other devices, and how
// what a NIC placed there becomes readable.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include <weightsync/os.hpp>

#include "../../cuda/driver.hpp"

namespace weightsync::verbs {

// Memory as a dma-buf, which other devices' drivers understand.
struct DmaBuf {
    UniqueFd fd;               // of whole pages; empty when it cannot be had
    std::uint64_t offset = 0;  // of the address in it
    std::string problem;       // why it cannot be had
};
[[nodiscard]] DmaBuf export_dmabuf(const cuda::Driver& driver, std::uint64_t address,
                                   std::uint64_t nbytes);

// Whether the module by which NICs reach GPU memory without a dma-buf is loaded. `sysfs`: "/sys".
[[nodiscard]] bool has_peermem(const std::string& sysfs);

// Makes what NICs placed in memory of GPUs readable for kernels that are launched afterwards.
// Nothing for GPUs that see to it themselves, and for host memory.
class GpuFlush {
  public:
    // Memory of the host is ignored.
    void add(const cuda::Driver& driver, std::uint64_t address);
    [[nodiscard]] bool is_needed() const noexcept { return !contexts_.empty(); }
    // Throws kMemory.
    void run() const;

  private:
    const cuda::Driver* driver_ = nullptr;
    std::vector<void*> contexts_;  // of the driver, one per GPU
};

}  // namespace weightsync::verbs
