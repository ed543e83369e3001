// What fi_shuffle holds back, and how it passes it on. What callers of libfabric see of it is in
// fi_shuffle.cpp.
#pragma once

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <unordered_map>
#include <utility>
#include <vector>

#include "fi_abi.hpp"

namespace shuffle {

using namespace fi;

inline std::atomic<std::uint64_t> num_held{0}, num_reordered{0};

inline std::uint64_t setting(const char* name, std::uint64_t otherwise) {
    const char* text = std::getenv(name);
    return text != nullptr && *text != '\0' ? std::strtoull(text, nullptr, 10) : otherwise;
}

// Providers such as ofi_rxm open providers below them through the same functions, and `net` opens
// an endpoint of its own domain for each connection, in the middle of a write. Those stay as they
// are: writes are shuffled once, where the application posts them.
inline thread_local int depth = 0;
struct Inside {
    Inside() { ++depth; }
    ~Inside() { --depth; }
    Inside(const Inside&) = delete;
    Inside& operator=(const Inside&) = delete;
};

// A copy of a provider's table, of the provider's own length, that knows whom it belongs to.
template <typename Table, typename Owner>
class Patch {
  public:
    Patch(Table*& place, Owner* owner) : original_(place) {
        const std::size_t length = std::max(place->size, sizeof(Table));
        memory_ = std::make_unique<std::byte[]>(sizeof(Owner*) + length);
        std::memcpy(memory_.get(), &owner, sizeof owner);
        std::memcpy(memory_.get() + sizeof owner, place, place->size);
        place = table();
    }
    Table* table() { return reinterpret_cast<Table*>(memory_.get() + sizeof(Owner*)); }
    const Table* operator->() const { return original_; }

  private:
    const Table* original_;
    std::unique_ptr<std::byte[]> memory_;
};

template <typename Owner, typename Table>
Owner& owner_of(Table* table) {
    Owner* owner = nullptr;
    std::memcpy(&owner, reinterpret_cast<std::byte*>(table) - sizeof owner, sizeof owner);
    return *owner;
}

struct Write {
    enum class Call { kWrite, kWriteData, kWriteMsg } call;
    const void* buf;
    std::size_t len;
    std::size_t num_segments;  // 0 or 1
    void* desc;
    std::uint64_t data;
    fi_addr_t to;
    fi_rma_iov there;
    void* context;
    std::uint64_t flags;
};

struct Failed {
    Write write;
    int error;
};

struct Queue;

// ---- endpoint -----------------------------------------------------------------------------------

struct Endpoint {
    explicit Endpoint(fid_ep* endpoint);  // puts our functions into its tables

    // Holds the write, or passes another one on to make room; -EAGAIN if there is none to be had.
    ssize_t post(const Write& write);
    // Passes on `num` of those held, at random, until the provider has no room. Returns how many
    // are left.
    std::size_t release(std::size_t num, std::vector<Failed>& failed);
    ssize_t pass(const Write& write);

    fid_ep* const ep;
    Patch<fi_ops_rma, Endpoint> rma;
    Patch<fi_ops, Endpoint> self;
    Queue* queue = nullptr;  // where writes complete; it outlives the endpoint
    std::mutex mutex;
    std::vector<Write> held;  // in the order they were posted
    std::minstd_rand random;
    const std::size_t window;
};

struct Queue {
    explicit Queue(fid_cq* queue);  // puts our functions into its tables

    void fail(std::vector<Failed>&& failed);
    // Passes a part of what is held on; `divisor` 1: all. Returns how many are left.
    std::size_t release(std::size_t divisor);
    bool has_failed();

    fid_cq* const cq;
    Patch<fi_ops_cq, Queue> ops;
    Patch<fi_ops, Queue> self;
    std::mutex mutex;  // before the endpoints'
    std::vector<Endpoint*> endpoints;
    std::mutex failed_mutex;  // innermost: a post fails under its endpoint's lock
    std::deque<Failed> failed;
    // A caller sleeps, or is about to: nobody would pass on what is held from now on.
    std::atomic<bool> is_asleep{false};
};

// All queues that are open, by their fid: what is bound or waited for may not be ours.
inline std::mutex queues_mutex;
inline std::unordered_map<const void*, Queue*>& queues() {
    static auto* const all = new std::unordered_map<const void*, Queue*>;  // outlives destructors
    return *all;
}
inline Queue* find_queue(const void* fid) {
    const std::lock_guard lock(queues_mutex);
    const auto found = queues().find(fid);
    return found == queues().end() ? nullptr : found->second;
}

inline ssize_t Endpoint::pass(const Write& w) {
    const Inside inside;
    switch (w.call) {
        case Write::Call::kWrite:
            return rma->write(ep, w.buf, w.len, w.desc, w.to, w.there.addr, w.there.key, w.context);
        case Write::Call::kWriteData:
            return rma->writedata(ep, w.buf, w.len, w.desc, w.data, w.to, w.there.addr, w.there.key,
                                  w.context);
        case Write::Call::kWriteMsg:
            break;
    }
    const iovec segment{const_cast<void*>(w.buf), w.len};
    void* desc = w.desc;
    const fi_msg_rma message{&segment, &desc, w.num_segments, w.to, &w.there, 1, w.context, w.data};
    return rma->writemsg(ep, &message, w.flags);
}

inline std::size_t Endpoint::release(std::size_t num, std::vector<Failed>& failed) {
    for (; num > 0 && !held.empty(); --num) {
        const std::size_t k = random() % held.size();
        const ssize_t result = pass(held[k]);
        if (result == -EAGAIN) {
            break;
        }
        if (result != 0) {
            failed.push_back({held[k], static_cast<int>(-result)});
        } else if (k != 0) {
            ++num_reordered;
        }
        held.erase(held.begin() + static_cast<std::ptrdiff_t>(k));
    }
    return held.size();
}

inline ssize_t Endpoint::post(const Write& write) {
    const std::lock_guard lock(mutex);
    std::vector<Failed> failed;
    ssize_t result = 0;
    if (window == 0 || queue == nullptr || queue->is_asleep) {
        result = pass(write);
    } else if (held.size() >= window && release(1, failed) >= window) {
        result = -EAGAIN;
    } else {
        held.push_back(write);
        ++num_held;
    }
    if (!failed.empty()) {
        queue->fail(std::move(failed));
    }
    return result;
}

inline void Queue::fail(std::vector<Failed>&& more) {
    const std::lock_guard lock(failed_mutex);
    failed.insert(failed.end(), more.begin(), more.end());
}

inline bool Queue::has_failed() {
    const std::lock_guard lock(failed_mutex);
    return !failed.empty();
}

inline std::size_t Queue::release(std::size_t divisor) {
    const std::lock_guard lock(mutex);
    std::size_t left = 0;
    std::vector<Failed> refused;
    for (Endpoint* endpoint : endpoints) {
        const std::lock_guard held_lock(endpoint->mutex);
        const std::size_t num = endpoint->held.size();
        left += endpoint->release((num + divisor - 1) / divisor, refused);
    }
    if (!refused.empty()) {
        fail(std::move(refused));
    }
    return left;
}

}  // namespace shuffle
