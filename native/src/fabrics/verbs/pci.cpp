#include "pci.hpp"

#include <algorithm>
#include <charconv>
#include <fstream>

namespace weightsync::verbs {

namespace {

namespace fs = std::filesystem;

std::string read_word(const fs::path& path) {
    std::ifstream file(path);
    std::string word;
    file >> word;
    return word;
}

int read_int(const fs::path& path, int otherwise) {
    const std::string word = read_word(path);
    int value = otherwise;
    std::from_chars(word.data(), word.data() + word.size(), value);
    return value;
}

// "0000:17:00.0"
bool is_pci_address(const std::string& name) noexcept {
    return name.size() >= 12 && name[name.size() - 2] == '.' && name[name.size() - 5] == ':' &&
           name[name.size() - 8] == ':';
}

// Display controllers of class 3D or VGA, as NVIDIA's are; and AMD's processing accelerators.
bool is_gpu(const fs::path& device) {
    const std::string kind = read_word(device / "class");  // "0x030200"
    const std::string maker = read_word(device / "vendor");
    const bool is_display = kind.starts_with("0x0302") || kind.starts_with("0x0300");
    return (is_display || kind.starts_with("0x1200")) && (maker == "0x10de" || maker == "0x1002");
}

}  // namespace

const char* to_text(PciDistance distance) noexcept {
    switch (distance) {
        case PciDistance::kSwitch:
            return "PIX";
        case PciDistance::kSwitches:
            return "PXB";
        case PciDistance::kHostBridge:
            return "PHB";
        case PciDistance::kNode:
            return "NODE";
        case PciDistance::kSystem:
            return "SYS";
    }
    return "unknown";
}

std::optional<PciDevice> find_pci_device(const fs::path& link) {
    std::error_code error;
    const fs::path folder = fs::canonical(link, error);
    if (error || !is_pci_address(folder.filename().string())) {
        return std::nullopt;
    }
    PciDevice device;
    device.address = folder.filename().string();
    device.numa_node = read_int(folder / "numa_node", -1);
    for (const fs::path& part : folder) {
        const std::string name = part.string();
        if (is_pci_address(name) || (device.path.empty() && name.starts_with("pci"))) {
            device.path.push_back(name);
        }
    }
    return device;
}

std::vector<PciDevice> list_gpus(const std::string& sysfs) {
    std::vector<PciDevice> gpus;
    std::error_code error;
    const fs::path folder = fs::path(sysfs) / "bus" / "pci" / "devices";
    for (const fs::directory_entry& entry : fs::directory_iterator(folder, error)) {
        if (!is_gpu(entry.path())) {
            continue;
        }
        if (auto device = find_pci_device(entry.path())) {
            gpus.push_back(std::move(*device));
        }
    }
    std::ranges::sort(gpus, {}, [](const PciDevice& gpu) { return gpu.address; });
    return gpus;
}

PciDistance distance_between(const PciDevice& one, const PciDevice& other) noexcept {
    const auto [mine, theirs] = std::ranges::mismatch(one.path, other.path);
    const auto num_common = mine - one.path.begin();
    if (num_common == 0) {
        return one.numa_node >= 0 && one.numa_node == other.numa_node ? PciDistance::kNode
                                                                      : PciDistance::kSystem;
    }
    if (num_common == 1) {
        return PciDistance::kHostBridge;
    }
    // Bridges between the last common one and either device: within one switch it is the port that
    // the device hangs on.
    const auto bridges = std::max(one.path.end() - mine, other.path.end() - theirs) - 1;
    return bridges <= 1 ? PciDistance::kSwitch : PciDistance::kSwitches;
}

}  // namespace weightsync::verbs
