// Where devices sit in the PCI tree, as sysfs shows it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace weightsync::verbs {

// How far apart two devices are, near to far; the words are those of `nvidia-smi topo`.
enum class PciDistance : std::uint8_t {
    kSwitch,      // "PIX": at most one PCIe switch between them
    kSwitches,    // "PXB": several switches, but no host bridge
    kHostBridge,  // "PHB": the same host bridge
    kNode,        // "NODE": the same NUMA node
    kSystem,      // "SYS": across NUMA nodes
};
[[nodiscard]] const char* to_text(PciDistance distance) noexcept;

struct PciDevice {
    std::string address;            // "0000:17:00.0"
    std::vector<std::string> path;  // from the host bridge ("pci0000:17") to the device
    int numa_node = -1;             // -1: unknown
};

// The device that a link of sysfs such as class/infiniband/mlx5_0/device leads to; none for devices
// of software.
[[nodiscard]] std::optional<PciDevice> find_pci_device(const std::filesystem::path& link);

// GPUs of all makers, sorted by address. `sysfs`: normally "/sys".
[[nodiscard]] std::vector<PciDevice> list_gpus(const std::string& sysfs);

[[nodiscard]] PciDistance distance_between(const PciDevice& one, const PciDevice& other) noexcept;

}  // namespace weightsync::verbs
