#include "digest_keys.hpp"

#include <cstddef>

namespace weightsync::kernels {

const ShortKeys& short_keys() noexcept {
    static const ShortKeys keys = [] {
        ShortKeys made{};
        for (int lane = 0; lane < kLanes; ++lane) {
            // Seeded by the lane; candidates in the order of splitmix64, each number taken once.
            std::array<bool, 1 << 16> is_taken{};
            is_taken[0] = true;
            std::uint64_t state = mix(static_cast<std::uint64_t>(lane) + 1);
            for (std::size_t i = 0; i < kSegment;) {
                state += kGamma;
                const auto candidate = static_cast<std::uint16_t>(mix(state));
                if (!is_taken[candidate]) {
                    is_taken[candidate] = true;
                    made.lane[lane][i++] = static_cast<std::int16_t>(candidate);
                }
            }
        }
        return made;
    }();
    return keys;
}

}  // namespace weightsync::kernels
