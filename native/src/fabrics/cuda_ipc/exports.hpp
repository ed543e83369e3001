// The source's end: its leased allocations on GPUs, by the names under which other processes of the
// host can open them.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "../../cuda/driver.hpp"
#include "../local/pull_memory.hpp"

namespace weightsync::cuda_ipc {

// What the notes of a source are made of.
struct Allocation {
    std::uint64_t base = 0;  // in the source
    std::uint64_t nbytes = 0;
    std::uint64_t id = 0;  // of the driver: another allocation at the same base has another one
    cuda::Uuid device{};
    cuda::IpcHandle handle{};
};
static_assert(sizeof(Allocation) == 104);

// Thread-safe.
class Exports : public std::enable_shared_from_this<Exports> {
  public:
    explicit Exports(const cuda::Driver& driver) : driver_(driver) {}

    // As PullMemory's.
    void follow(LeaseTable& leases);
    void add(std::weak_ptr<local::Announcer> announcer);
    [[nodiscard]] std::shared_ptr<const local::Notes> notes() const;

  private:
    struct Entry {
        Allocation allocation;
        std::uint64_t num_leases = 0;
    };
    // Null for memory of the host, else it counts as one lease until it is dropped. Throws kMemory.
    [[nodiscard]] std::shared_ptr<void> enroll(std::uint64_t address, std::uint64_t nbytes);
    // With the last lease of an allocation, sinks close it before it may be freed; those that do
    // not answer in time are given up.
    void remove(std::uint64_t base) noexcept;
    void announce() noexcept;
    void publish();

    const cuda::Driver& driver_;
    std::mutex follow_mutex_;
    bool is_following_ = false;
    mutable std::mutex mutex_;
    std::map<std::uint64_t, Entry> entries_;
    std::uint64_t version_ = 0;
    std::shared_ptr<const local::Notes> notes_;
    std::vector<std::weak_ptr<local::Announcer>> announcers_;
};

}  // namespace weightsync::cuda_ipc
