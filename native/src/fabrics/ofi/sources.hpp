// Registered source memory, for providers that read only what is registered (FI_MR_LOCAL).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include <weightsync/lease.hpp>

#include "objects.hpp"

namespace weightsync::ofi {

class SourceRegions : public std::enable_shared_from_this<SourceRegions> {
  public:
    // `domains`: in the order of the rails; null where nothing needs to be registered.
    explicit SourceRegions(std::vector<std::shared_ptr<Domain>> domains);

    // Registers what is not yet; a region lives as long as its lease. Throws kMemory.
    void add(std::span<LeaseState* const> leases);
    // Descriptor of memory that a registered and pinned lease holds, or null.
    [[nodiscard]] void* find(std::size_t rail, std::uint64_t address, std::uint64_t nbytes) const;
    [[nodiscard]] bool is_needed() const noexcept { return is_needed_; }

  private:
    struct Entry {
        std::uint64_t address;
        std::uint64_t nbytes;
        std::vector<std::unique_ptr<Region>> regions;  // by rail
    };
    // Kept by a lease: takes its entry away.
    struct Ticket;
    void remove(const Entry* entry) noexcept;

    std::vector<std::shared_ptr<Domain>> domains_;
    bool is_needed_ = false;
    mutable std::mutex mutex_;
    std::multimap<std::uint64_t, std::shared_ptr<Entry>> entries_;  // by address
};

}  // namespace weightsync::ofi
