// The source's memory, registered with every rail for as long as it is leased.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "resources.hpp"

namespace weightsync::verbs {

// Thread-safe. Looking keys up takes no lock: readers hold a snapshot that is never changed.
class LocalMemory : public std::enable_shared_from_this<LocalMemory> {
  public:
    struct Entry {
        std::uint64_t begin = 0;
        std::uint64_t end = 0;
        std::uint64_t reach = 0;  // largest end of this and all earlier entries: leases overlap
        std::vector<std::uint32_t> lkeys;  // by rail
    };
    // Sorted by begin.
    using Entries = std::vector<Entry>;

    explicit LocalMemory(std::vector<std::shared_ptr<ProtectionDomain>> rails)
        : rails_(std::move(rails)), snapshot_(std::make_shared<Entries>()) {}

    // Registers with all rails, until the handle is dropped. Throws kMemory.
    [[nodiscard]] std::shared_ptr<void> add(std::uint64_t address, std::uint64_t nbytes);

    [[nodiscard]] std::uint64_t version() const noexcept { return version_.load(); }
    [[nodiscard]] std::shared_ptr<const Entries> snapshot() const;

  private:
    struct Handle;
    void remove(const Handle& handle) noexcept;
    void publish();

    const std::vector<std::shared_ptr<ProtectionDomain>> rails_;
    std::atomic<std::uint64_t> version_{1};
    mutable std::mutex mutex_;
    std::vector<const Handle*> handles_;
    std::shared_ptr<const Entries> snapshot_;
};

// One reader's view: used by one thread.
class MemoryView {
  public:
    MemoryView(std::shared_ptr<const LocalMemory> memory, std::size_t rail)
        : memory_(std::move(memory)), rail_(rail) {}

    // Look for new registrations; once per batch.
    void refresh();
    // The key of all of [address, address + nbytes); false when nothing registered holds it.
    [[nodiscard]] bool find(std::uint64_t address, std::uint64_t nbytes,
                            std::uint32_t& lkey) noexcept;

  private:
    std::shared_ptr<const LocalMemory> memory_;
    std::size_t rail_;
    std::uint64_t version_ = 0;
    std::shared_ptr<const LocalMemory::Entries> entries_;
    std::size_t hint_ = 0;  // where the last one was: programs walk their tensors in order
};

}  // namespace weightsync::verbs
