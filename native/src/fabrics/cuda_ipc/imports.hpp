// The sources' allocations, open in the sink's process.
#pragma once

#include <cstring>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <vector>

#include "../local/pull_memory.hpp"
#include "context.hpp"
#include "exports.hpp"
#include "regions.hpp"

namespace weightsync::cuda_ipc {

// One allocation, of one session. Thread-safe.
class Import : Counted<Kind::kMapping> {
  public:
    // `is_own`: of this very process, where nothing is to be opened.
    Import(std::shared_ptr<const Context> context, const Allocation& allocation, bool is_own)
        : context_(std::move(context)), allocation_(allocation), is_own_(is_own) {}
    ~Import() { close(); }
    Import(const Import&) = delete;
    Import& operator=(const Import&) = delete;

    // Once. Returns a CUresult.
    [[nodiscard]] int open() noexcept;
    // Waits for those who use it.
    void close() noexcept;
    // While the lock is held it stays open, if is_open().
    [[nodiscard]] std::shared_lock<std::shared_mutex> use() const {
        return std::shared_lock(mutex_);
    }
    [[nodiscard]] bool is_open() const noexcept { return is_open_; }

    [[nodiscard]] const Allocation& allocation() const noexcept { return allocation_; }
    [[nodiscard]] bool is_of(const Allocation& other) const noexcept {
        return std::memcmp(&allocation_, &other, sizeof(other)) == 0;
    }
    [[nodiscard]] bool overlaps(const Allocation& other) const noexcept {
        return allocation_.base < other.base + other.nbytes &&
               other.base < allocation_.base + allocation_.nbytes;
    }
    // Of the sink's context.
    [[nodiscard]] std::uint64_t address() const noexcept { return address_; }

  private:
    const std::shared_ptr<const Context> context_;
    const Allocation allocation_;
    const bool is_own_;
    mutable std::shared_mutex mutex_;
    bool is_open_ = false;
    std::uint64_t address_ = 0;
};

// What is open of each process. The driver refuses to open an allocation while one that was freed
// before it, at the same addresses, is open still: in whatever session that is, it is closed first.
class ImportTable {
  public:
    void add(int pid, const std::shared_ptr<Import>& import);
    void close_stale(int pid, const Allocation& fresh);

  private:
    std::mutex mutex_;
    std::unordered_map<int, std::vector<std::weak_ptr<Import>>> by_pid_;
};

// Of one session, by the notes of one version.
class GpuImports final : public local::Imports {
  public:
    void close() const noexcept override {
        for (const auto& import : all) {
            import->close();
        }
    }
    std::vector<std::shared_ptr<Import>> all;  // by base, as the regions
    Regions regions;
};

}  // namespace weightsync::cuda_ipc
