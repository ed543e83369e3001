// Process-wide count of live objects: tests compare it with its start value.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace weightsync {

enum class Kind : std::uint8_t {
    kEngine,
    kBlock,
    kLease,
    kTarget,
    kRemote,
    kOperation,
    kSession,
    kMapping,
    kFd,
    kThread,
    kWire,
    kGroup,
    kVerbs,  // an object of libibverbs
    kFid,    // an object of libfabric
};
inline constexpr std::array<std::string_view, 14> kKindNames = {
    "engine",  "block", "lease",  "target", "remote", "operation", "session",
    "mapping", "fd",    "thread", "wire",   "group",  "verbs",     "fid",
};

namespace detail {
inline std::array<std::atomic<std::int64_t>, kKindNames.size()> live_counts{};
}  // namespace detail

inline void count_live(Kind kind, std::int64_t change) noexcept {
    // relaxed: a statistic, it orders nothing
    detail::live_counts[static_cast<std::size_t>(kind)].fetch_add(change,
                                                                  std::memory_order_relaxed);
}

[[nodiscard]] inline std::int64_t live_count(Kind kind) noexcept {
    return detail::live_counts[static_cast<std::size_t>(kind)].load(std::memory_order_relaxed);
}

[[nodiscard]] inline std::int64_t live_object_count() noexcept {
    std::int64_t total = 0;
    for (const auto& count : detail::live_counts) {
        total += count.load(std::memory_order_relaxed);
    }
    return total;
}

// Base class that counts its instances.
template <Kind kind>
class Counted {
  protected:
    Counted() noexcept { count_live(kind, 1); }
    ~Counted() { count_live(kind, -1); }
    Counted(const Counted&) = delete;
    Counted& operator=(const Counted&) = delete;
};

}  // namespace weightsync
