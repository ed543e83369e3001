// Source memory as the NICs know it: every leased range registered with the rails that read only
// what is registered, for as long as it is leased.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include <weightsync/lease.hpp>

namespace weightsync {

// Thread-safe. Looking keys up takes no lock: readers hold a snapshot that is never changed.
class LocalMemory : public std::enable_shared_from_this<LocalMemory> {
  public:
    // What posting needs (an lkey, a descriptor) and what keeps it valid.
    struct Registration {
        std::shared_ptr<void> handle;
        std::uint64_t key = 0;
    };
    using Register =
        std::function<Registration(std::size_t rail, std::uint64_t address, std::uint64_t nbytes)>;
    struct Entry {
        std::uint64_t begin = 0;
        std::uint64_t end = 0;
        std::uint64_t reach = 0;  // largest end of this and all earlier entries: leases overlap
        std::vector<std::uint64_t> keys;  // by rail
    };
    // Sorted by begin.
    using Entries = std::vector<Entry>;

    // `enroll` throws kMemory.
    LocalMemory(std::size_t num_rails, Register enroll)
        : num_rails_(num_rails), enroll_(std::move(enroll)) {}

    // From now on all that is leased is registered before it can be read. Called with a remote's
    // connection, so that a sink's memory is never registered for reading. Throws kMemory; may be
    // called again.
    void follow(LeaseTable& leases);
    void unfollow(LeaseTable& leases) noexcept;

    [[nodiscard]] std::uint64_t version() const noexcept { return version_.load(); }
    [[nodiscard]] std::shared_ptr<const Entries> snapshot() const;

  private:
    struct Handle;
    // Registers with all rails, until the handle is dropped.
    [[nodiscard]] std::shared_ptr<void> add(std::uint64_t address, std::uint64_t nbytes);
    void remove(const Handle& handle) noexcept;
    void publish();

    const std::size_t num_rails_;
    const Register enroll_;
    std::mutex follow_mutex_;
    bool is_following_ = false;
    std::atomic<std::uint64_t> version_{1};
    mutable std::mutex mutex_;
    std::vector<const Handle*> handles_;
    std::shared_ptr<const Entries> snapshot_ = std::make_shared<Entries>();
};

// One reader's view: used by one thread at a time.
class MemoryView {
  public:
    MemoryView(std::shared_ptr<const LocalMemory> memory, std::size_t rail)
        : memory_(std::move(memory)), rail_(rail) {}

    // Look for new registrations; once per batch.
    void refresh();
    // The key of all of [address, address + nbytes); false when nothing registered holds it.
    [[nodiscard]] bool find(std::uint64_t address, std::uint64_t nbytes,
                            std::uint64_t& key) noexcept;

  private:
    std::shared_ptr<const LocalMemory> memory_;
    std::size_t rail_;
    std::uint64_t version_ = 0;
    std::shared_ptr<const LocalMemory::Entries> entries_;
    std::size_t hint_ = 0;  // where the last one was: programs walk their tensors in order
};

}  // namespace weightsync
