#include <weightsync/lease.hpp>

#include <algorithm>
#include <string>

#include <weightsync/error.hpp>

namespace weightsync {

std::shared_ptr<LeaseState> LeaseTable::add(std::uint64_t address, std::uint64_t nbytes,
                                            std::shared_ptr<void> owner) {
    if (nbytes == 0 || nbytes > kMaxBytes || address == 0 || address > UINT64_MAX - nbytes) {
        throw Error(Scope::kConfig, "cannot register " + std::to_string(nbytes) +
                                        " bytes at address " + std::to_string(address));
    }
    auto lease = std::make_shared<LeaseState>();
    lease->address = address;
    lease->nbytes = nbytes;
    lease->owner = std::move(owner);
    std::unique_lock lock(mutex_);
    for (std::uint64_t seen = 0; seen != num_registrars_;) {
        seen = num_registrars_;
        const std::array registrars = registrars_;
        lock.unlock();  // it takes a while
        for (std::size_t i = 0; i < kNumRegistries; ++i) {
            lease->registrations[i].reset();
            if (registrars[i]) {
                lease->registrations[i] = registrars[i](address, nbytes);
            }
        }
        lock.lock();
    }
    live_.emplace(lease.get(), lease);
    is_stale_ = true;
    return lease;
}

void LeaseTable::set_registrar(Registry registry, Registrar registrar) {
    const auto which = static_cast<std::size_t>(registry);
    std::vector<std::shared_ptr<LeaseState>> leases;
    {
        const std::lock_guard lock(mutex_);
        registrars_[which] = registrar;
        ++num_registrars_;
        for (const auto& [state, lease] : live_) {
            leases.push_back(lease);
        }
    }
    if (!registrar) {
        return;
    }
    for (const auto& lease : leases) {
        std::shared_ptr<void> registration = registrar(lease->address, lease->nbytes);
        const std::lock_guard lock(mutex_);
        if (live_.contains(lease.get()) && !lease->registrations[which]) {
            lease->registrations[which] = std::move(registration);
        }
    }
}

void LeaseTable::release(const std::shared_ptr<LeaseState>& lease, const Deadline& deadline,
                         const Wait& wait) {
    std::shared_ptr<void> owner;  // dropped last, with no lock held
    decltype(lease->registrations) registrations;
    {
        const std::lock_guard lock(mutex_);
        if (lease->is_released) {
            return;
        }
        if (lease->exports.load() != 0) {
            throw Error(Scope::kConfig,
                        "memory is exported by an open target; close or fence the target first");
        }
        lease->is_released = true;  // no new pins from here on
        is_stale_ = true;
    }
    bool is_idle = false;
    try {
        is_idle = wait(unpinned_, [&] { return lease->pins.load() == 0; }, deadline);
    } catch (...) {  // interrupted: as if never asked
        const std::lock_guard lock(mutex_);
        lease->is_released = false;
        is_stale_ = true;
        throw;
    }
    const std::lock_guard lock(mutex_);
    if (!is_idle) {
        lease->is_released = false;
        is_stale_ = true;
        throw Error(Scope::kTimeout,
                    "memory at " + std::to_string(lease->address) + " (" +
                        std::to_string(lease->nbytes) + " bytes) is still read by " +
                        std::to_string(lease->pins.load()) +
                        " operation(s); wait for them, or close the engine if their peer is gone",
                    {{"address", static_cast<std::int64_t>(lease->address)}});
    }
    live_.erase(lease.get());
    owner = std::move(lease->owner);
    registrations = std::move(lease->registrations);
}

void LeaseTable::abandon(const std::shared_ptr<LeaseState>& lease) noexcept {
    std::shared_ptr<void> owner;
    decltype(lease->registrations) registrations;
    const std::lock_guard lock(mutex_);
    if (lease->is_released) {
        return;
    }
    lease->is_released = true;
    live_.erase(lease.get());
    is_stale_ = true;
    if (lease->pins.load() != 0 || lease->exports.load() != 0) {
        abandoned_.push_back(lease);
    } else {
        owner = std::move(lease->owner);
        registrations = std::move(lease->registrations);
    }
}

std::vector<LeaseState*> LeaseTable::pin(std::span<const Write> rows) {
    std::vector<LeaseState*> pinned;
    pinned.reserve(std::min<std::size_t>(rows.size(), 64));
    const std::lock_guard lock(mutex_);
    if (is_stale_) {
        sort_entries();
    }
    std::size_t hint = 0;
    const LeaseState* last = nullptr;
    for (std::size_t i = 0; i < rows.size(); ++i) {
        const Write& row = rows[i];
        if (row.nbytes == 0) {
            continue;
        }
        if (last != nullptr && row.source >= last->address && row.nbytes <= last->nbytes &&
            row.source - last->address <= last->nbytes - row.nbytes) {
            continue;
        }
        LeaseState* lease = find(row.source, row.nbytes, hint);
        if (lease == nullptr) {
            unpin(pinned);
            throw Error(Scope::kConfig,
                        "write " + std::to_string(i) + " reads " + std::to_string(row.nbytes) +
                            " bytes at address " + std::to_string(row.source) +
                            ", which no live lease holds; register the memory first",
                        {{"row", static_cast<std::int64_t>(i)}});
        }
        lease->pins.fetch_add(1, std::memory_order_relaxed);  // made visible by the mutex
        pinned.push_back(lease);
        last = lease;
    }
    return pinned;
}

void LeaseTable::unpin(std::span<LeaseState* const> leases) noexcept {
    for (LeaseState* lease : leases) {
        // The lease may be gone right after its last pin, so nothing of it is touched then.
        lease->pins.fetch_sub(1, std::memory_order_seq_cst);
    }
    if (!leases.empty()) {
        wake(unpinned_);
    }
}

std::vector<std::shared_ptr<LeaseState>> LeaseTable::collect() noexcept {
    std::vector<std::shared_ptr<LeaseState>> idle;
    const std::lock_guard lock(mutex_);
    std::erase_if(abandoned_, [&](std::shared_ptr<LeaseState>& lease) {
        if (lease->pins.load() != 0 || lease->exports.load() != 0) {
            return false;
        }
        idle.push_back(std::move(lease));
        return true;
    });
    return idle;
}

LeaseState* LeaseTable::find(std::uint64_t address, std::uint64_t nbytes,
                             std::size_t& hint) const noexcept {
    const std::uint64_t end = address + nbytes;
    if (end < address) {
        return nullptr;
    }
    // Programs walk their tensors in address order: the next lease is the likely one.
    for (std::size_t i = hint; i < std::min(hint + 2, entries_.size()); ++i) {
        if (entries_[i].begin <= address && end <= entries_[i].end) {
            hint = i;
            return entries_[i].lease;
        }
    }
    const auto after = std::ranges::upper_bound(entries_, address, {}, &Entry::begin);
    for (auto entry = after; entry != entries_.begin();) {
        --entry;
        if (entry->reach < end) {
            return nullptr;
        }
        if (end <= entry->end) {
            hint = static_cast<std::size_t>(entry - entries_.begin());
            return entry->lease;
        }
    }
    return nullptr;
}

void LeaseTable::sort_entries() {
    entries_.clear();
    entries_.reserve(live_.size());
    for (const auto& [lease, owner] : live_) {
        if (!lease->is_released) {
            entries_.push_back({lease->address, lease->address + lease->nbytes, 0, lease});
        }
    }
    std::ranges::sort(entries_, [](const Entry& a, const Entry& b) {
        return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
    });
    std::uint64_t reach = 0;
    for (Entry& entry : entries_) {
        reach = std::max(reach, entry.end);
        entry.reach = reach;
    }
    is_stale_ = false;
}

}  // namespace weightsync
