// Addresses that stand for memory of a GPU, among those of the host.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace weightsync::cuda_ipc {

struct Region {
    std::uint64_t begin = 0;  // as whoever names it sees it
    std::uint64_t nbytes = 0;
    std::uint64_t address = 0;  // of the same byte, for this process' driver
};

// A run of bytes of one kind.
struct Place {
    bool is_gpu = false;
    std::uint64_t address = 0;  // for this process; of the host's memory: as it was asked for
    std::uint64_t nbytes = 0;   // as long it goes on like that; 0 at the end of all addresses
    std::size_t region = 0;     // of a GPU: its number in the order of addresses
};

// Sorted and disjoint.
class Regions {
  public:
    // Regions that meet or overlap are no disjoint ones: false, and nothing is changed.
    [[nodiscard]] bool assign(std::vector<Region> regions) {
        std::ranges::sort(regions, {}, &Region::begin);
        for (std::size_t i = 0; i < regions.size(); ++i) {
            const Region& region = regions[i];
            const std::uint64_t limit = i + 1 < regions.size()
                                            ? regions[i + 1].begin
                                            : std::numeric_limits<std::uint64_t>::max();
            if (region.nbytes == 0 || region.nbytes > limit - region.begin) {
                return false;
            }
        }
        regions_ = std::move(regions);
        return true;
    }

    [[nodiscard]] bool empty() const noexcept { return regions_.empty(); }

    [[nodiscard]] Place find(std::uint64_t address) const noexcept {
        const auto next = std::ranges::upper_bound(regions_, address, {}, &Region::begin);
        if (next != regions_.begin()) {
            const Region& region = *std::prev(next);
            const std::uint64_t offset = address - region.begin;
            if (offset < region.nbytes) {
                return {true, region.address + offset, region.nbytes - offset,
                        static_cast<std::size_t>(std::prev(next) - regions_.begin())};
            }
        }
        const std::uint64_t end =
            next == regions_.end() ? std::numeric_limits<std::uint64_t>::max() : next->begin;
        return {false, address, end - address};
    }

  private:
    std::vector<Region> regions_;
};

}  // namespace weightsync::cuda_ipc
