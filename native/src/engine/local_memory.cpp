#include <weightsync/local_memory.hpp>

#include <algorithm>
#include <string>

#include <weightsync/error.hpp>

namespace weightsync {

// What one lease has: gone with the lease's last operation.
struct LocalMemory::Handle {
    Handle(std::shared_ptr<LocalMemory> memory, std::uint64_t address, std::uint64_t nbytes)
        : owner(std::move(memory)), begin(address), end(address + nbytes) {
        for (std::size_t rail = 0; rail < owner->num_rails_; ++rail) {
            registrations.push_back(owner->enroll_(rail, address, nbytes));
        }
    }
    ~Handle() { owner->remove(*this); }
    Handle(const Handle&) = delete;
    Handle& operator=(const Handle&) = delete;

    std::shared_ptr<LocalMemory> owner;
    std::uint64_t begin;
    std::uint64_t end;
    std::vector<Registration> registrations;
};

void LocalMemory::follow(LeaseTable& leases) {
    const std::lock_guard lock(follow_mutex_);
    if (is_following_) {
        return;
    }
    leases.set_registrar(Registry::kNics,
                         [self = shared_from_this()](std::uint64_t address, std::uint64_t nbytes) {
                             return self->add(address, nbytes);
                         });
    is_following_ = true;
}

void LocalMemory::unfollow(LeaseTable& leases) noexcept {
    const std::lock_guard lock(follow_mutex_);
    try {
        leases.set_registrar(Registry::kNics, nullptr);
    } catch (const std::exception& error) {
        report(std::string("registered memory: ") + error.what());
    }
}

std::shared_ptr<void> LocalMemory::add(std::uint64_t address, std::uint64_t nbytes) {
    // Pinning takes a while: without the lock.
    auto handle = std::make_shared<Handle>(shared_from_this(), address, nbytes);
    const std::lock_guard lock(mutex_);
    handles_.push_back(handle.get());
    publish();
    return handle;
}

void LocalMemory::remove(const Handle& handle) noexcept {
    const std::lock_guard lock(mutex_);
    if (std::erase(handles_, &handle) != 0) {
        publish();
    }
}

void LocalMemory::publish() {
    auto entries = std::make_shared<Entries>();
    entries->reserve(handles_.size());
    for (const Handle* handle : handles_) {
        Entry entry;
        entry.begin = handle->begin;
        entry.end = handle->end;
        for (const auto& registration : handle->registrations) {
            entry.keys.push_back(registration.key);
        }
        entries->push_back(std::move(entry));
    }
    std::ranges::sort(*entries, [](const Entry& a, const Entry& b) {
        return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
    });
    std::uint64_t reach = 0;
    for (Entry& entry : *entries) {
        reach = std::max(reach, entry.end);
        entry.reach = reach;
    }
    snapshot_ = std::move(entries);
    version_.fetch_add(1);
}

std::shared_ptr<const LocalMemory::Entries> LocalMemory::snapshot() const {
    const std::lock_guard lock(mutex_);
    return snapshot_;
}

void MemoryView::refresh() {
    // Read first: what is published in between is seen at the next refresh, and nobody posts from
    // memory whose registration has not returned.
    const std::uint64_t version = memory_->version();
    if (version != version_) {
        entries_ = memory_->snapshot();
        version_ = version;
        hint_ = 0;
    }
}

bool MemoryView::find(std::uint64_t address, std::uint64_t nbytes, std::uint64_t& key) noexcept {
    const std::uint64_t end = address + nbytes;
    for (std::size_t i = hint_; i < std::min(hint_ + 2, entries_->size()); ++i) {
        const LocalMemory::Entry& entry = (*entries_)[i];
        if (entry.begin <= address && end <= entry.end) {
            hint_ = i;
            key = entry.keys[rail_];
            return true;
        }
    }
    const auto after = std::ranges::upper_bound(*entries_, address, {}, &LocalMemory::Entry::begin);
    for (auto entry = after; entry != entries_->begin();) {
        --entry;
        if (entry->reach < end) {
            return false;
        }
        if (end <= entry->end) {
            hint_ = static_cast<std::size_t>(entry - entries_->begin());
            key = entry->keys[rail_];
            return true;
        }
    }
    return false;
}

}  // namespace weightsync
