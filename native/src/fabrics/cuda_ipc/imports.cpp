#include "imports.hpp"

namespace weightsync::cuda_ipc {

int Import::open() noexcept {
    const std::lock_guard lock(mutex_);
    const cuda::Driver& driver = context_->driver();
    const Current current(*context_);
    if (current.result() != 0) {
        return current.result();
    }
    address_ = allocation_.base;
    if (is_own_) {
        is_open_ = true;
        return 0;
    }
    if (const int result =
            driver.ipc_open_mem_handle(&address_, allocation_.handle, cuda::kIpcLazyPeerAccess);
        result != 0) {
        return result;
    }
    is_open_ = true;
    // The peer says how long it is; the driver knows. It may be part of something larger.
    std::uint64_t base = 0;
    std::size_t nbytes = 0;
    if (const int result = driver.mem_get_address_range(&base, &nbytes, address_); result != 0) {
        return result;
    }
    const std::uint64_t offset = address_ - base;
    const bool is_inside = offset <= nbytes && allocation_.nbytes <= nbytes - offset;
    return is_inside ? 0 : cuda::kInvalidValue;
}

void Import::close() noexcept {
    const std::lock_guard lock(mutex_);
    if (is_open_ && !is_own_) {
        const Current current(*context_);
        context_->driver().ipc_close_mem_handle(address_);
    }
    is_open_ = false;
}

void ImportTable::add(int pid, const std::shared_ptr<Import>& import) {
    const std::lock_guard lock(mutex_);
    for (auto entry = by_pid_.begin(); entry != by_pid_.end();) {
        std::erase_if(entry->second, [](const auto& known) { return known.expired(); });
        entry = entry->second.empty() ? by_pid_.erase(entry) : std::next(entry);
    }
    by_pid_[pid].push_back(import);
}

void ImportTable::close_stale(int pid, const Allocation& fresh) {
    std::vector<std::shared_ptr<Import>> stale;
    {
        const std::lock_guard lock(mutex_);
        const auto found = by_pid_.find(pid);
        if (found == by_pid_.end()) {
            return;
        }
        for (const auto& known : found->second) {
            if (auto import = known.lock();
                import && import->overlaps(fresh) && !import->is_of(fresh)) {
                stale.push_back(std::move(import));
            }
        }
    }
    for (const auto& import : stale) {
        import->close();
    }
}

}  // namespace weightsync::cuda_ipc
