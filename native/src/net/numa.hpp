// Where a NIC is, as sysfs tells it.
#pragma once

#include <string>

#include "address.hpp"

namespace weightsync::net {

// Network interface that has an address; empty when none has.
[[nodiscard]] std::string interface_of(const Address& address);

// NUMA node of a device folder such as /sys/class/net/eth0/device, or -1.
[[nodiscard]] int numa_node_of(const std::string& device_folder);

// Keeps the calling thread on the cores of a NUMA node that this process may use. False, and
// nothing changes, when there are none.
bool pin_to_node(int node) noexcept;

// Keeps the calling thread near the NIC with this address, where its node is known.
void pin_near(const Address& address) noexcept;

}  // namespace weightsync::net
