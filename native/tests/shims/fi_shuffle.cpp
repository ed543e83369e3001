// fi_shuffle: makes any RMA provider of libfabric deliver writes out of order, as EFA's SRD may.
//
//   LD_PRELOAD=.../fi_shuffle.so FI_SHUFFLE_WINDOW=16 FI_SHUFFLE_SEED=1 COMMAND
//
// No provider that runs without special hardware reorders anything. This wraps `fi_fabric` and,
// from there, the operation tables of domains, completion queues and endpoints. A posted write is
// held back, up to FI_SHUFFLE_WINDOW of them per endpoint, and passed on later in random order:
// when the window is full, and whenever the queue is read that the endpoint's writes complete to.
// It works for callers that are linked with libfabric and for those that look it up with dlsym().
//
// What it keeps: each write is passed on once, from a thread that posts to the endpoint or reads
// its queue. Nobody waits for a write that is held: before a caller sleeps (fi_cq_sread,
// fi_trywait), all are passed on, and while it sleeps new ones are not held. FI_FENCE waits for
// those before it. A write that the provider refuses late is an error entry of the queue. Closing
// an endpoint drops what it holds, as closing drops what is in flight.
//
// What it does not: split one write into segments that arrive out of order; hold writes of several
// segments, injected ones, messages, reads and atomics (they pass at once, so they overtake);
// counters, fi_cancel on a held write, scalable endpoints, and the calls with flags,
// fi_domain2 and fi_endpoint2. FI_SHUFFLE_WINDOW=0 holds nothing.
//
// fi_shuffle_counts() tells what happened so far; the same goes as one line "PID HELD REORDERED" to
// the end of the file FI_SHUFFLE_STATS, if set, when the process exits.
#include "fi_shuffle.hpp"

#include <dlfcn.h>
#include <fcntl.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>

using namespace shuffle;

namespace {

// ---- what stands in the tables: endpoint
// ----------------------------------------------------------

ssize_t on_write(fid_ep* ep, const void* buf, std::size_t len, void* desc, fi_addr_t to,
                 std::uint64_t addr, std::uint64_t key, void* context) {
    return owner_of<Endpoint>(ep->rma).post(
        {Write::Call::kWrite, buf, len, 1, desc, 0, to, {addr, len, key}, context, 0});
}

ssize_t on_writedata(fid_ep* ep, const void* buf, std::size_t len, void* desc, std::uint64_t data,
                     fi_addr_t to, std::uint64_t addr, std::uint64_t key, void* context) {
    return owner_of<Endpoint>(ep->rma).post(
        {Write::Call::kWriteData, buf, len, 1, desc, data, to, {addr, len, key}, context, 0});
}

ssize_t on_writemsg(fid_ep* ep, const fi_msg_rma* m, std::uint64_t flags) {
    Endpoint& endpoint = owner_of<Endpoint>(ep->rma);
    if ((flags & FI_FENCE) != 0) {
        const std::lock_guard lock(endpoint.mutex);
        std::vector<Failed> failed;
        const std::size_t left = endpoint.release(endpoint.held.size(), failed);
        if (!failed.empty()) {
            endpoint.queue->fail(std::move(failed));
        }
        return left != 0 ? -EAGAIN : endpoint.rma->writemsg(ep, m, flags);
    }
    // Of an injected write the caller may reuse the source at once.
    if (m->iov_count > 1 || m->rma_iov_count != 1 || (flags & FI_INJECT) != 0) {
        const std::lock_guard lock(endpoint.mutex);
        return endpoint.rma->writemsg(ep, m, flags);
    }
    const bool is_empty = m->iov_count == 0;
    // FI_MORE promises that another write follows at once: of the order they get here, it is
    // untrue.
    return endpoint.post({Write::Call::kWriteMsg, is_empty ? nullptr : m->msg_iov[0].iov_base,
                          is_empty ? 0 : m->msg_iov[0].iov_len, m->iov_count,
                          !is_empty && m->desc != nullptr ? m->desc[0] : nullptr, m->data, m->addr,
                          m->rma_iov[0], m->context, flags & ~FI_MORE});
}

int on_endpoint_bind(fid* self, fid* other, std::uint64_t flags) {
    Endpoint& endpoint = owner_of<Endpoint>(self->ops);
    const Inside inside;
    const int result = endpoint.self->bind(self, other, flags);
    Queue* queue = result == 0 && (flags & FI_TRANSMIT) != 0 ? find_queue(other) : nullptr;
    if (queue != nullptr) {
        const std::lock_guard lock(queue->mutex);
        queue->endpoints.push_back(&endpoint);
        endpoint.queue = queue;
    }
    return result;
}

int on_endpoint_close(fid* self) {
    Endpoint& endpoint = owner_of<Endpoint>(self->ops);
    if (endpoint.queue != nullptr) {
        const std::lock_guard lock(endpoint.queue->mutex);
        std::erase(endpoint.queue->endpoints, &endpoint);
        const std::lock_guard held_lock(endpoint.mutex);
        endpoint.held.clear();
    }
    const Inside inside;
    const int result = endpoint.self->close(self);
    if (result == 0) {
        delete &endpoint;
    } else if (endpoint.queue != nullptr) {
        const std::lock_guard lock(endpoint.queue->mutex);
        endpoint.queue->endpoints.push_back(&endpoint);
    }
    return result;
}

}  // namespace

shuffle::Endpoint::Endpoint(fid_ep* endpoint)
    : ep(endpoint),
      rma(endpoint->rma, this),
      self(endpoint->fid.ops, this),
      window(setting("FI_SHUFFLE_WINDOW", 16)) {
    static std::atomic<std::uint64_t> number{0};
    random.seed(static_cast<unsigned>(setting("FI_SHUFFLE_SEED", 1) * 7919 + ++number));
    held.reserve(window);
    rma.table()->write = on_write;
    rma.table()->writedata = on_writedata;
    rma.table()->writemsg = on_writemsg;
    self.table()->bind = on_endpoint_bind;
    self.table()->close = on_endpoint_close;
}

namespace {

// ---- what stands in the tables: completion queue
// --------------------------------------------------

// A quarter at a time keeps some back for the next reads; an application that goes on reading gets
// all.
constexpr std::size_t kReadDivisor = 4;

template <typename Read>
ssize_t read_awake(Queue& queue, Read read) {
    queue.is_asleep = false;
    if (queue.has_failed()) {
        return -FI_EAVAIL;
    }
    queue.release(kReadDivisor);
    const Inside inside;
    return read();
}

// `read(ms)` sleeps in the provider. While some cannot be passed on for want of room it sleeps in
// slices: the provider makes room as it makes progress.
template <typename Read>
ssize_t read_asleep(Queue& queue, int timeout_ms, Read read) {
    using Clock = std::chrono::steady_clock;
    const auto end = Clock::now() + std::chrono::milliseconds(timeout_ms);
    while (true) {
        queue.is_asleep = true;
        const bool is_empty = queue.release(1) == 0;
        if (queue.has_failed()) {
            queue.is_asleep = false;
            return -FI_EAVAIL;
        }
        const auto left = std::chrono::ceil<std::chrono::milliseconds>(end - Clock::now()).count();
        const int left_ms = timeout_ms < 0 ? -1 : static_cast<int>(std::max<std::int64_t>(left, 0));
        const int slice_ms = is_empty ? left_ms : (left_ms < 0 ? 1 : std::min(left_ms, 1));
        const Inside inside;
        const ssize_t result = read(slice_ms);
        if (result != -EAGAIN || is_empty || left_ms == 0) {
            queue.is_asleep = false;
            return result;
        }
    }
}

ssize_t on_read(fid_cq* cq, void* buffer, std::size_t count) {
    Queue& queue = owner_of<Queue>(cq->ops);
    return read_awake(queue, [&] { return queue.ops->read(cq, buffer, count); });
}

ssize_t on_readfrom(fid_cq* cq, void* buffer, std::size_t count, fi_addr_t* from) {
    Queue& queue = owner_of<Queue>(cq->ops);
    return read_awake(queue, [&] { return queue.ops->readfrom(cq, buffer, count, from); });
}

ssize_t on_sread(fid_cq* cq, void* buffer, std::size_t count, const void* condition, int timeout) {
    Queue& queue = owner_of<Queue>(cq->ops);
    return read_asleep(queue, timeout, [&](int slice_ms) {
        return queue.ops->sread(cq, buffer, count, condition, slice_ms);
    });
}

ssize_t on_sreadfrom(fid_cq* cq, void* buffer, std::size_t count, fi_addr_t* from,
                     const void* condition, int timeout) {
    Queue& queue = owner_of<Queue>(cq->ops);
    return read_asleep(queue, timeout, [&](int slice_ms) {
        return queue.ops->sreadfrom(cq, buffer, count, from, condition, slice_ms);
    });
}

ssize_t on_readerr(fid_cq* cq, fi_cq_err_entry* entry, std::uint64_t flags) {
    Queue& queue = owner_of<Queue>(cq->ops);
    {
        const std::lock_guard lock(queue.failed_mutex);
        if (!queue.failed.empty()) {
            const Failed failed = queue.failed.front();
            queue.failed.pop_front();
            entry->op_context = failed.write.context;
            entry->flags = FI_RMA | FI_WRITE;
            entry->len = failed.write.len;
            entry->olen = 0;
            entry->err = failed.error;
            entry->prov_errno = failed.error;
            entry->err_data_size = 0;
            return 1;
        }
    }
    return queue.ops->readerr(cq, entry, flags);
}

int on_queue_close(fid* self) {
    Queue& queue = owner_of<Queue>(self->ops);
    {
        const std::lock_guard lock(queues_mutex);
        queues().erase(self);
    }
    const Inside inside;
    const int result = queue.self->close(self);
    if (result == 0) {
        delete &queue;
    } else {
        const std::lock_guard lock(queues_mutex);
        queues()[self] = &queue;
    }
    return result;
}

}  // namespace

shuffle::Queue::Queue(fid_cq* queue)
    : cq(queue), ops(queue->ops, this), self(queue->fid.ops, this) {
    ops.table()->read = on_read;
    ops.table()->readfrom = on_readfrom;
    ops.table()->readerr = on_readerr;
    ops.table()->sread = on_sread;
    ops.table()->sreadfrom = on_sreadfrom;
    self.table()->close = on_queue_close;
    const std::lock_guard lock(queues_mutex);
    queues()[&queue->fid] = this;
}

namespace {

// ---- what stands in the tables: domain and fabric
// -------------------------------------------------

// These two are few, and stay until the process ends.
struct Domain {
    explicit Domain(fid_domain* domain);
    Patch<fi_ops_domain, Domain> ops;
};

struct Fabric {
    explicit Fabric(fid_fabric* fabric);
    Patch<fi_ops_fabric, Fabric> ops;
};

int on_endpoint(fid_domain* domain, fi_info* info, fid_ep** ep, void* context) {
    const bool is_outermost = depth == 0;
    const Inside inside;
    const int result = owner_of<Domain>(domain->ops).ops->endpoint(domain, info, ep, context);
    if (result == 0 && is_outermost && (*ep)->rma != nullptr) {
        new Endpoint(*ep);  // deleted by on_endpoint_close
    }
    return result;
}

int on_cq_open(fid_domain* domain, fi_cq_attr* attr, fid_cq** cq, void* context) {
    const bool is_outermost = depth == 0;
    const Inside inside;
    const int result = owner_of<Domain>(domain->ops).ops->cq_open(domain, attr, cq, context);
    if (result == 0 && is_outermost) {
        new Queue(*cq);  // deleted by on_queue_close
    }
    return result;
}

Domain::Domain(fid_domain* domain) : ops(domain->ops, this) {
    ops.table()->endpoint = on_endpoint;
    ops.table()->cq_open = on_cq_open;
}

int on_domain(fid_fabric* fabric, fi_info* info, fid_domain** domain, void* context) {
    const Inside inside;
    const int result = owner_of<Fabric>(fabric->ops).ops->domain(fabric, info, domain, context);
    if (result == 0) {
        new Domain(*domain);
    }
    return result;
}

// 0 means: you may sleep on the file descriptors of these. Until then nothing may stay held.
int on_trywait(fid_fabric* fabric, fid** fids, int count) {
    std::vector<Queue*> asleep;
    bool is_empty = true;
    for (int i = 0; i < count; ++i) {
        if (Queue* queue = find_queue(fids[i])) {
            queue->is_asleep = true;
            asleep.push_back(queue);
            is_empty = queue->release(1) == 0 && !queue->has_failed() && is_empty;
        }
    }
    const Inside inside;
    const int result =
        is_empty ? owner_of<Fabric>(fabric->ops).ops->trywait(fabric, fids, count) : -EAGAIN;
    if (result != 0) {
        for (Queue* queue : asleep) {
            queue->is_asleep = false;
        }
    }
    return result;
}

Fabric::Fabric(fid_fabric* fabric) : ops(fabric->ops, this) {
    ops.table()->domain = on_domain;
    ops.table()->trywait = on_trywait;
}

// ---- the way in
// -------------------------------------------------------------------------------------

using Dlsym = void* (*)(void*, const char*) noexcept;
using FiFabric = int (*)(fi_fabric_attr*, fid_fabric**, void*);

Dlsym real_dlsym() noexcept {
    static const auto found = [] {
        void* symbol = nullptr;
        // x86-64 and arm64, with glibc since 2.34 and before
        for (const char* version : {"GLIBC_2.34", "GLIBC_2.2.5", "GLIBC_2.17"}) {
            if (symbol == nullptr) {
                symbol = dlvsym(RTLD_NEXT, "dlsym", version);
            }
        }
        return reinterpret_cast<Dlsym>(symbol);
    }();
    return found;
}

// What the last dlsym(_, "fi_fabric") found: a library that was opened later is not in RTLD_NEXT.
std::atomic<FiFabric> looked_up{nullptr};

FiFabric real_fi_fabric() {
    if (const FiFabric found = looked_up) {
        return found;
    }
    // Without a version the oldest one would be found, which takes older structures.
    void* symbol = dlvsym(RTLD_NEXT, "fi_fabric", "FABRIC_1.1");
    return reinterpret_cast<FiFabric>(symbol != nullptr ? symbol
                                                        : real_dlsym()(RTLD_NEXT, "fi_fabric"));
}

struct AtExit {
    ~AtExit() {
        const char* path = std::getenv("FI_SHUFFLE_STATS");
        const int file =
            path != nullptr ? open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644) : -1;
        if (file >= 0) {
            dprintf(file, "%ld %llu %llu\n", static_cast<long>(getpid()),
                    static_cast<unsigned long long>(num_held),
                    static_cast<unsigned long long>(num_reordered));
            close(file);
        }
    }
} at_exit;

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// How many writes were held so far, and how many of them were passed on before an older one.
void fi_shuffle_counts(std::uint64_t* held, std::uint64_t* reordered) {
    *held = num_held;
    *reordered = num_reordered;
}

int fi_fabric(fi::fi_fabric_attr* attr, fi::fid_fabric** fabric, void* context) {
    const FiFabric real = real_fi_fabric();
    if (real == nullptr) {
        return -ENOSYS;
    }
    const bool is_outermost = depth == 0;
    const Inside inside;
    const int result = real(attr, fabric, context);
    if (result == 0 && is_outermost) {
        new Fabric(*fabric);
    }
    return result;
}

// Run-time tables ask a handle of libfabric, which no preloaded symbol would answer. The last call
// must be a jump (-O2): RTLD_NEXT means the library after that of the caller.
void* dlsym(void* handle, const char* name) noexcept {
    const Dlsym real = real_dlsym();
    if (std::strcmp(name, "fi_fabric") != 0) {
        return real(handle, name);
    }
    void* found = real(handle, name);
    if (found != nullptr && found != reinterpret_cast<void*>(&fi_fabric)) {
        looked_up = reinterpret_cast<FiFabric>(found);
    }
    return found == nullptr ? nullptr : reinterpret_cast<void*>(&fi_fabric);
}
}  // extern "C"
#pragma GCC visibility pop
