// RDMA devices of this host: ports, GIDs and limits.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "pci.hpp"
#include "resources.hpp"

namespace weightsync::verbs {

enum class GidType : std::uint8_t { kInfiniBand, kRoceV1, kRoceV2 };

struct GidEntry {
    int index = 0;
    Gid gid{};
    GidType type = GidType::kInfiniBand;
    [[nodiscard]] bool is_ipv4() const noexcept;  // ::ffff:a.b.c.d
};

// "10.0.0.1", "fe80::1" or "fe80:0000:..." for InfiniBand.
[[nodiscard]] std::string gid_text(const GidEntry& entry);

struct GpuNearby {
    std::string address;  // "0000:17:00.0"
    PciDistance distance = PciDistance::kSystem;
};

// What sysfs says; needs neither libibverbs nor the right to open devices.
struct PortFacts {
    std::string device;
    int port = 0;
    bool is_active = false;
    std::string state;            // "ACTIVE"
    std::string link_layer;       // "Ethernet" or "InfiniBand"
    double gbit_per_s = 0;        // 0: unknown
    int numa_node = -1;           // -1: unknown
    std::string interface;        // network device, empty on InfiniBand
    std::string pci_address;      // "0000:17:00.0", empty for devices of software
    std::vector<GpuNearby> gpus;  // nearest first
    std::vector<GidEntry> gids;
};

// All ports of all devices, sorted by device and port. `sysfs`: normally "/sys".
[[nodiscard]] std::vector<PortFacts> list_ports(const std::string& sysfs = "/sys");

// RoCEv2 over IPv4, then RoCEv2 over global IPv6, then link-local IPv6; on InfiniBand the first.
// RoCEv1 is never chosen: it does not route and many switches drop it. Null when none fits.
[[nodiscard]] const GidEntry* choose_gid(const PortFacts& port) noexcept;

}  // namespace weightsync::verbs
