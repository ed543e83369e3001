#include "numa.hpp"

#include <ifaddrs.h>
#include <sched.h>

#include <cstring>
#include <exception>
#include <fstream>

namespace weightsync::net {

namespace {

bool is_same_host(const sockaddr* a, const Address& b) noexcept {
    if (a == nullptr || a->sa_family != b.family()) {
        return false;
    }
    if (b.family() == AF_INET6) {
        return std::memcmp(&reinterpret_cast<const sockaddr_in6*>(a)->sin6_addr,
                           &reinterpret_cast<const sockaddr_in6&>(b.storage).sin6_addr,
                           sizeof(in6_addr)) == 0;
    }
    return reinterpret_cast<const sockaddr_in*>(a)->sin_addr.s_addr ==
           reinterpret_cast<const sockaddr_in&>(b.storage).sin_addr.s_addr;
}

// Cores of a list such as "0-3,8".
cpu_set_t parse_cores(std::istream& text) {
    cpu_set_t cores;
    CPU_ZERO(&cores);
    int first = 0;
    while (text >> first) {
        int last = first;
        if (text.peek() == '-') {
            text.get();
            text >> last;
        }
        for (int core = first; core <= last && core < CPU_SETSIZE; ++core) {
            CPU_SET(static_cast<unsigned>(core), &cores);
        }
        if (text.peek() == ',') {
            text.get();
        }
    }
    return cores;
}

}  // namespace

std::string interface_of(const Address& address) {
    ifaddrs* all = nullptr;
    if (::getifaddrs(&all) != 0) {
        return {};
    }
    std::string name;
    for (const ifaddrs* one = all; one != nullptr; one = one->ifa_next) {
        if (is_same_host(one->ifa_addr, address)) {
            name = one->ifa_name;
            break;
        }
    }
    ::freeifaddrs(all);
    return name;
}

int numa_node_of(const std::string& device_folder) {
    std::ifstream file(device_folder + "/numa_node");
    int node = -1;
    return file >> node ? node : -1;
}

bool pin_to_node(int node) noexcept {
    try {
        std::ifstream file("/sys/devices/system/node/node" + std::to_string(node) + "/cpulist");
        cpu_set_t wanted = parse_cores(file);
        cpu_set_t allowed;
        if (::sched_getaffinity(0, sizeof(allowed), &allowed) != 0) {
            return false;
        }
        CPU_AND(&wanted, &wanted, &allowed);
        return CPU_COUNT(&wanted) > 0 && ::sched_setaffinity(0, sizeof(wanted), &wanted) == 0;
    } catch (const std::exception&) {
        return false;  // out of memory: a thread in the wrong place works too
    }
}

void pin_near(const Address& address) noexcept {
    try {
        const std::string name = interface_of(address);
        const int node = name.empty() ? -1 : numa_node_of("/sys/class/net/" + name + "/device");
        if (node >= 0) {
            pin_to_node(node);
        }
    } catch (const std::exception&) {
        return;
    }
}

}  // namespace weightsync::net
