// Registered source memory. A write may read only what a live lease holds, and a lease cannot end
// while an operation reads it.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <unordered_map>
#include <vector>

#include <weightsync/ranges.hpp>
#include <weightsync/wait.hpp>

namespace weightsync {

// Who wants to know of leased memory: NICs, and other processes of the host.
enum class Registry : std::uint8_t { kNics, kProcesses };
inline constexpr std::size_t kNumRegistries = 2;

struct LeaseState : Counted<Kind::kLease> {
    std::uint64_t address = 0;
    std::uint64_t nbytes = 0;
    std::atomic<std::uint64_t> pins{0};     // by operations in flight
    std::atomic<std::uint64_t> exports{0};  // by open targets
    bool is_released = false;               // guarded by the table's mutex
    std::shared_ptr<void> owner;            // what keeps the memory alive
    // Of the fabric, by registry, if it wants one; dropped first.
    std::array<std::shared_ptr<void>, kNumRegistries> registrations;
};

class LeaseTable {
  public:
    [[nodiscard]] std::shared_ptr<LeaseState> add(std::uint64_t address, std::uint64_t nbytes,
                                                  std::shared_ptr<void> owner);
    // From here on every lease is registered with `registrar` before it can be read, and those that
    // live are now; throws what it throws, and may be called again. Null: no more. Not by two
    // threads at once for one registry.
    using Registrar =
        std::function<std::shared_ptr<void>(std::uint64_t address, std::uint64_t nbytes)>;
    void set_registrar(Registry registry, Registrar registrar);

    // Ends the lease and drops its owner. Waits for operations in flight until the deadline, then
    // throws kTimeout and the lease lives on. Throws kConfig while an open target exports it.
    // `wait` is the fabric's, which may have to be driven.
    using Wait = std::function<bool(WakeWord&, const std::function<bool()>&, const Deadline&)>;
    void release(const std::shared_ptr<LeaseState>& lease, const Deadline& deadline,
                 const Wait& wait);
    // Ends the lease without waiting; its owner is kept until the last operation is done.
    void abandon(const std::shared_ptr<LeaseState>& lease) noexcept;

    // Pin the source of every row. Throws kConfig naming the first row outside all leases; nothing
    // stays pinned then. One lock for the batch.
    [[nodiscard]] std::vector<LeaseState*> pin(std::span<const Write> rows);
    void unpin(std::span<LeaseState* const> leases) noexcept;

    // Owners of abandoned leases whose operations are done: dropped by the caller, on a thread
    // where that is allowed.
    [[nodiscard]] std::vector<std::shared_ptr<LeaseState>> collect() noexcept;

  private:
    struct Entry {
        std::uint64_t begin;
        std::uint64_t end;
        std::uint64_t reach;  // largest end of this and all earlier entries: leases may overlap
        LeaseState* lease;
    };
    [[nodiscard]] LeaseState* find(std::uint64_t address, std::uint64_t nbytes,
                                   std::size_t& hint) const noexcept;
    void sort_entries();

    std::mutex mutex_;
    // Those too that are about to be released, but for pins.
    std::unordered_map<LeaseState*, std::shared_ptr<LeaseState>> live_;
    std::vector<Entry> entries_;  // sorted by begin; rebuilt when stale
    bool is_stale_ = false;
    std::array<Registrar, kNumRegistries> registrars_;
    std::uint64_t num_registrars_ = 0;
    std::vector<std::shared_ptr<LeaseState>> abandoned_;
    WakeWord unpinned_;
};

}  // namespace weightsync
