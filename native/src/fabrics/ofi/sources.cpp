#include "sources.hpp"

#include <algorithm>

namespace weightsync::ofi {

struct SourceRegions::Ticket {
    std::shared_ptr<SourceRegions> owner;
    std::shared_ptr<Entry> entry;
    Ticket(std::shared_ptr<SourceRegions> regions, std::shared_ptr<Entry> added)
        : owner(std::move(regions)), entry(std::move(added)) {}
    ~Ticket() { owner->remove(entry.get()); }
    Ticket(const Ticket&) = delete;
    Ticket& operator=(const Ticket&) = delete;
};

SourceRegions::SourceRegions(std::vector<std::shared_ptr<Domain>> domains)
    : domains_(std::move(domains)),
      is_needed_(
          std::ranges::any_of(domains_, [](const auto& domain) { return domain != nullptr; })) {}

void SourceRegions::add(std::span<LeaseState* const> leases) {
    for (LeaseState* lease : leases) {
        // A lock per lease: two posts may come with the same one.
        const std::lock_guard lock(lease->attachment_mutex);
        if (lease->attachment) {
            continue;
        }
        auto entry = std::make_shared<Entry>(Entry{lease->address, lease->nbytes, {}});
        for (const auto& domain : domains_) {
            entry->regions.push_back(domain ? std::make_unique<Region>(domain, lease->address,
                                                                       lease->nbytes, abi::FI_WRITE)
                                            : nullptr);
        }
        {
            const std::lock_guard table_lock(mutex_);
            entries_.emplace(entry->address, entry);
        }
        lease->attachment = std::make_shared<Ticket>(shared_from_this(), std::move(entry));
    }
}

void* SourceRegions::find(std::size_t rail, std::uint64_t address, std::uint64_t nbytes) const {
    const std::lock_guard lock(mutex_);
    // Leases may overlap: the nearest one that begins before it and holds all of it.
    for (auto entry = entries_.upper_bound(address); entry != entries_.begin();) {
        --entry;
        const Entry& known = *entry->second;
        if (address - known.address <= known.nbytes &&
            nbytes <= known.nbytes - (address - known.address)) {
            return known.regions[rail] ? known.regions[rail]->desc() : nullptr;
        }
    }
    return nullptr;
}

void SourceRegions::remove(const Entry* entry) noexcept {
    const std::lock_guard lock(mutex_);
    std::erase_if(entries_, [&](const auto& known) { return known.second.get() == entry; });
}

}  // namespace weightsync::ofi
