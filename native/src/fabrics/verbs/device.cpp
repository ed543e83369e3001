#include "device.hpp"

#include <arpa/inet.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <filesystem>
#include <fstream>

namespace weightsync::verbs {

namespace {

namespace fs = std::filesystem;

// First line of a file, or empty.
std::string read_line(const fs::path& path) {
    std::ifstream file(path);
    std::string line;
    std::getline(file, line);
    return line;
}

std::optional<int> to_int(std::string_view text) {
    int value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size()) {
        return std::nullopt;
    }
    return value;
}

// Numbered entries of a folder, in order.
std::vector<int> numbers_in(const fs::path& folder) {
    std::vector<int> numbers;
    std::error_code error;
    for (const fs::directory_entry& entry : fs::directory_iterator(folder, error)) {
        if (const auto number = to_int(entry.path().filename().string())) {
            numbers.push_back(*number);
        }
    }
    std::ranges::sort(numbers);
    return numbers;
}

bool is_zero(const Gid& gid) noexcept {
    return std::ranges::all_of(gid, [](std::uint8_t byte) { return byte == 0; });
}

bool is_link_local(const Gid& gid) noexcept {
    return gid[0] == 0xFE && (gid[1] & 0xC0) == 0x80;
}

std::vector<GidEntry> read_gids(const fs::path& port, bool is_infiniband) {
    // Tables of a thousand places are filled from the front: reading them all takes a tenth of a
    // second on some machines.
    constexpr int kMaxGap = 32;
    std::vector<GidEntry> gids;
    for (int index = 0, gap = 0; gap < kMaxGap; ++index) {
        GidEntry entry;
        entry.index = index;
        const std::string name = std::to_string(index);
        const std::string text = read_line(port / "gids" / name);
        if (::inet_pton(AF_INET6, text.c_str(), entry.gid.data()) != 1 || is_zero(entry.gid)) {
            ++gap;  // an empty place of the table, or its end
            continue;
        }
        gap = 0;
        // Reading the type of an empty place fails, and InfiniBand has "IB/RoCE v1" too.
        const std::string type = read_line(port / "gid_attrs" / "types" / name);
        entry.type = type == "RoCE v2" ? GidType::kRoceV2
                     : is_infiniband   ? GidType::kInfiniBand
                                       : GidType::kRoceV1;
        gids.push_back(entry);
    }
    return gids;
}

std::vector<GpuNearby> gpus_near(const PciDevice& nic, const std::vector<PciDevice>& gpus) {
    std::vector<GpuNearby> found;
    for (const PciDevice& gpu : gpus) {
        found.push_back({gpu.address, distance_between(nic, gpu)});
    }
    std::ranges::stable_sort(found, {}, &GpuNearby::distance);
    return found;
}

PortFacts read_port(const fs::path& device, int number, const std::vector<PciDevice>& gpus) {
    const fs::path port = device / "ports" / std::to_string(number);
    PortFacts facts;
    facts.device = device.filename().string();
    facts.port = number;
    const std::string state = read_line(port / "state");  // "4: ACTIVE"
    facts.is_active = state.starts_with("4:");
    facts.state = state.size() > 3 ? state.substr(3) : "unknown";
    facts.link_layer = read_line(port / "link_layer");
    const std::string rate = read_line(port / "rate");  // "100 Gb/sec (4X EDR)", "2.5 Gb/sec ..."
    double gbit_per_s = 0;
    std::from_chars(rate.data(), rate.data() + rate.size(), gbit_per_s);
    facts.gbit_per_s = gbit_per_s;
    facts.numa_node = to_int(read_line(device / "device" / "numa_node")).value_or(-1);
    if (const auto nic = find_pci_device(device / "device")) {
        facts.pci_address = nic->address;
        facts.gpus = gpus_near(*nic, gpus);
    }
    facts.interface = read_line(port / "gid_attrs" / "ndevs" / "0");
    facts.gids = read_gids(port, facts.link_layer == "InfiniBand");
    return facts;
}

int rank_of(const GidEntry& entry) noexcept {
    if (entry.type == GidType::kRoceV1) {
        return -1;
    }
    if (entry.type == GidType::kInfiniBand) {
        return is_link_local(entry.gid) ? 4 : 3;  // the subnet's default prefix is link-local
    }
    if (entry.is_ipv4()) {
        return 3;
    }
    return is_link_local(entry.gid) ? 1 : 2;
}

}  // namespace

bool GidEntry::is_ipv4() const noexcept {
    constexpr std::array<std::uint8_t, 12> kMapped = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF};
    return std::equal(kMapped.begin(), kMapped.end(), gid.begin());
}

std::string gid_text(const GidEntry& entry) {
    std::array<char, INET6_ADDRSTRLEN> text{};
    if (entry.is_ipv4()) {
        ::inet_ntop(AF_INET, entry.gid.data() + 12, text.data(), text.size());
    } else {
        ::inet_ntop(AF_INET6, entry.gid.data(), text.data(), text.size());
    }
    return text.data();
}

std::vector<PortFacts> list_ports(const std::string& sysfs) {
    const fs::path folder = fs::path(sysfs) / "class" / "infiniband";
    std::vector<fs::path> devices;
    std::error_code error;
    for (const fs::directory_entry& entry : fs::directory_iterator(folder, error)) {
        devices.push_back(entry.path());
    }
    std::ranges::sort(devices);
    const std::vector<PciDevice> gpus = list_gpus(sysfs);
    std::vector<PortFacts> ports;
    for (const fs::path& device : devices) {
        for (const int number : numbers_in(device / "ports")) {
            ports.push_back(read_port(device, number, gpus));
        }
    }
    return ports;
}

const GidEntry* choose_gid(const PortFacts& port) noexcept {
    const GidEntry* best = nullptr;
    for (const GidEntry& entry : port.gids) {
        if (rank_of(entry) >= 0 && (best == nullptr || rank_of(entry) > rank_of(*best))) {
            best = &entry;
        }
    }
    return best;
}

}  // namespace weightsync::verbs
