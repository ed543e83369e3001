// Counters of an engine and of its remotes.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace weightsync {

enum class Count : std::uint8_t {
    // as a source
    kOperations,
    kFailedOperations,
    kWrites,
    kBytesWritten,
    kNotifies,
    // as a sink; summed from its boards
    kArrivals,
    kBytesArrived,
    kDuplicates,
    kProtocolErrors,
    kWakeups,
    // as a sink, by the fabric
    kConnections,
    kRefusedConnections,
    kFences,
};
inline constexpr std::array<std::string_view, 13> kCountNames = {
    "operations",  "failed_operations",   "writes",     "bytes_written",   "notifies",
    "arrivals",    "bytes_arrived",       "duplicates", "protocol_errors", "wakeups",
    "connections", "refused_connections", "fences",
};

class Counters {
  public:
    // relaxed throughout: statistics, they order nothing
    void add(Count which, std::uint64_t amount = 1) noexcept {
        counts_[static_cast<std::size_t>(which)].fetch_add(amount, std::memory_order_relaxed);
    }
    [[nodiscard]] std::array<std::uint64_t, kCountNames.size()> read() const noexcept {
        std::array<std::uint64_t, kCountNames.size()> values{};
        for (std::size_t i = 0; i < values.size(); ++i) {
            values[i] = counts_[i].load(std::memory_order_relaxed);
        }
        return values;
    }

  private:
    std::array<std::atomic<std::uint64_t>, kCountNames.size()> counts_{};
};

}  // namespace weightsync
