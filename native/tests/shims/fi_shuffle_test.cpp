// Tests fi_shuffle.so over a fake libfabric: run with LD_PRELOAD=fi_shuffle.so.
//
//   fi_shuffle_test linked|looked-up
//
// How the program finds fi_fabric: by its linker, or by dlsym() on a handle.
#include <dlfcn.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <set>

#include "fake_fabric.hpp"

using namespace fi;

#define CHECK(condition)                                                         \
    do {                                                                         \
        if (!(condition)) {                                                      \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                                        \
        }                                                                        \
    } while (false)

namespace {

constexpr std::size_t kWindow = 16;  // FI_SHUFFLE_WINDOW's default

int (*open_fabric)(fi_fabric_attr*, fid_fabric**, void*) = nullptr;

void* context_of(std::uint64_t number) {
    return reinterpret_cast<void*>(number + 1);
}

// A queue, and an endpoint whose writes complete to it.
struct Rig {
    Rig() {
        fake = Fake{};
        CHECK(open_fabric(nullptr, &fabric, nullptr) == 0);
        CHECK(fabric->ops->domain(fabric, nullptr, &domain, nullptr) == 0);
        CHECK(domain->ops->cq_open(domain, nullptr, &cq, nullptr) == 0);
        ep = open_endpoint();
    }
    ~Rig() {
        CHECK(ep->fid.ops->close(&ep->fid) == 0);
        CHECK(cq->fid.ops->close(&cq->fid) == 0);
    }
    Rig(const Rig&) = delete;
    Rig& operator=(const Rig&) = delete;

    fid_ep* open_endpoint() {
        fid_ep* made = nullptr;
        CHECK(domain->ops->endpoint(domain, nullptr, &made, nullptr) == 0);
        CHECK(made->fid.ops->bind(&made->fid, &cq->fid, FI_TRANSMIT) == 0);
        return made;
    }
    ssize_t write(std::uint64_t number, fid_ep* by = nullptr) {
        by = by == nullptr ? ep : by;
        return by->rma->writedata(by, nullptr, number % 7, nullptr, number, 0, number, 0,
                                  context_of(number));
    }
    ssize_t message(std::uint64_t number, std::uint64_t flags, std::size_t num_segments = 1) {
        char byte = 0;
        const iovec segments[2] = {{&byte, 1}, {&byte, 1}};
        const fi_rma_iov there{number, 1, 0};
        const fi_msg_rma m{segments, nullptr, num_segments,       0,
                           &there,   1,       context_of(number), number};
        return ep->rma->writemsg(ep, &m, flags);
    }
    // Reads until nothing comes, for `num_quiet` reads in a row.
    std::vector<void*> read_all(int num_quiet = 3) {
        std::vector<void*> found;
        for (int quiet = 0; quiet < num_quiet;) {
            void* buffer[8];
            const ssize_t n = cq->ops->read(cq, buffer, 8);
            quiet = n > 0 ? 0 : quiet + 1;
            found.insert(found.end(), buffer, buffer + std::max<ssize_t>(n, 0));
        }
        return found;
    }

    fid_fabric* fabric = nullptr;
    fid_domain* domain = nullptr;
    fid_cq* cq = nullptr;
    fid_ep* ep = nullptr;
};

std::vector<std::uint64_t> order() {
    std::vector<std::uint64_t> addresses;
    for (const Posted& posted : fake.posted) {
        addresses.push_back(posted.addr);
    }
    return addresses;
}

void test_each_write_passes_once_and_out_of_order() {
    Rig rig;
    CHECK(fake.is_inner_untouched);
    constexpr std::uint64_t kNum = 500;
    for (std::uint64_t i = 0; i < kNum; ++i) {
        CHECK(rig.write(i) == 0);
        CHECK(fake.posted.size() + kWindow >= i + 1);
    }
    CHECK(fake.posted.size() + kWindow == kNum);
    CHECK(rig.read_all().size() == kNum);
    auto found = order();
    CHECK(!std::is_sorted(found.begin(), found.end()));
    for (const Posted& posted : fake.posted) {
        CHECK(posted.call == 'd' && posted.data == posted.addr && posted.len == posted.addr % 7);
        CHECK(posted.context == context_of(posted.addr));
    }
    std::sort(found.begin(), found.end());
    std::vector<std::uint64_t> all(kNum);
    std::iota(all.begin(), all.end(), 0);
    CHECK(found == all);
}

void test_a_full_provider_is_asked_again() {
    Rig rig;
    fake.num_busy = 1 << 30;
    for (std::uint64_t i = 0; i < kWindow; ++i) {
        CHECK(rig.write(i) == 0);
    }
    CHECK(rig.write(kWindow) == -EAGAIN);
    CHECK(rig.read_all().empty());
    fid* fids[] = {&rig.cq->fid};
    CHECK(rig.fabric->ops->trywait(rig.fabric, fids, 1) == -EAGAIN);  // must not sleep now
    fake.num_busy = 0;
    CHECK(rig.read_all().size() == kWindow);
}

void test_nothing_is_held_while_the_caller_sleeps() {
    Rig rig;
    CHECK(rig.write(0) == 0 && rig.write(1) == 0);
    CHECK(fake.posted.empty());
    fid* fids[] = {&rig.cq->fid};
    CHECK(rig.fabric->ops->trywait(rig.fabric, fids, 1) == 0);
    CHECK(fake.posted.size() == 2);
    CHECK(rig.write(2) == 0);
    CHECK(fake.posted.size() == 3);
    CHECK(rig.read_all().size() == 3);
    CHECK(rig.write(3) == 0);  // awake again
    CHECK(fake.posted.size() == 3);
    void* buffer[8];
    fake.num_busy = 5;  // sleeps in slices until there is room
    CHECK(rig.cq->ops->sread(rig.cq, buffer, 8, nullptr, -1) == 1);
    CHECK(buffer[0] == context_of(3));
    CHECK(rig.cq->ops->sread(rig.cq, buffer, 8, nullptr, 2) == -EAGAIN);
}

void test_a_late_refusal_is_an_error_entry() {
    Rig rig;
    fake.refused = context_of(5);
    for (std::uint64_t i = 0; i < 10; ++i) {
        CHECK(rig.write(i) == 0);
    }
    std::set<void*> done;
    int num_errors = 0;
    for (int i = 0; i < 100; ++i) {
        void* buffer[8];
        const ssize_t n = rig.cq->ops->read(rig.cq, buffer, 8);
        if (n == -FI_EAVAIL) {
            fi_cq_err_entry entry{};
            CHECK(rig.cq->ops->readerr(rig.cq, &entry, 0) == 1);
            CHECK(entry.op_context == context_of(5) && entry.err == ENOTCONN && entry.len == 5);
            CHECK(entry.flags == (FI_RMA | FI_WRITE));
            ++num_errors;
        }
        done.insert(buffer, buffer + std::max<ssize_t>(n, 0));
    }
    CHECK(num_errors == 1 && done.size() == 9 && !done.contains(context_of(5)));
    fi_cq_err_entry entry{};
    CHECK(rig.cq->ops->readerr(rig.cq, &entry, 0) == -EAGAIN);
}

void test_messages_keep_flags_and_fences_wait() {
    Rig rig;
    CHECK(rig.message(0, FI_MORE | FI_REMOTE_CQ_DATA) == 0);
    CHECK(rig.message(1, 0, 0) == 0);
    CHECK(fake.posted.empty());
    CHECK(rig.message(2, FI_INJECT) == 0);
    CHECK(order() == std::vector<std::uint64_t>{2});  // its source may change: not held
    CHECK(rig.message(3, 0, 2) == 0);
    CHECK(fake.posted.size() == 2);
    fake.num_busy = 1;
    CHECK(rig.message(4, FI_FENCE) == -EAGAIN);
    CHECK(rig.message(4, FI_FENCE) == 0);
    CHECK(fake.posted.size() == 5 && fake.posted[4].addr == 4);
    for (const Posted& posted : fake.posted) {
        CHECK(posted.call == 'm' && posted.data == posted.addr);
        CHECK(posted.addr != 0 || posted.flags == FI_REMOTE_CQ_DATA);
        CHECK(posted.addr != 1 || posted.len == 0);
    }
    CHECK(rig.read_all().size() == 5);
}

void test_closing_drops_what_is_held_and_nothing_else() {
    Rig rig;
    fid_ep* other = rig.open_endpoint();
    CHECK(rig.write(0) == 0 && rig.write(1, other) == 0);
    CHECK(other->fid.ops->close(&other->fid) == 0);
    CHECK(rig.read_all().size() == 1);
    CHECK(order() == std::vector<std::uint64_t>{0});
}

void test_a_provider_may_open_endpoints_while_it_writes() {
    Rig rig;
    fake.connects_by = rig.cq;
    for (std::uint64_t i = 0; i < 2 * kWindow; ++i) {
        CHECK(rig.write(i) == 0);  // was a deadlock: the queue is locked while held writes pass
    }
    CHECK(rig.read_all().size() == 2 * kWindow);
    CHECK(fake.is_connection_untouched);
}

void test_counts() {
    using Counts = void (*)(std::uint64_t*, std::uint64_t*);
    // RTLD_NEXT: the library after ours, which is the shim, whoever passes the question on.
    const auto counts = reinterpret_cast<Counts>(dlsym(RTLD_NEXT, "fi_shuffle_counts"));
    CHECK(counts != nullptr);
    std::uint64_t held = 0, reordered = 0;
    counts(&held, &reordered);
    CHECK(held >= 500 && reordered > 100 && reordered < held);
}

}  // namespace

int main(int argc, char** argv) {
    open_fabric = fi_fabric;
    if (argc > 1 && std::strcmp(argv[1], "looked-up") == 0) {
        void* handle = dlopen(FAKE_FABRIC, RTLD_NOW);
        CHECK(handle != nullptr);
        open_fabric = reinterpret_cast<decltype(open_fabric)>(dlsym(handle, "fi_fabric"));
        CHECK(dlsym(handle, "fi_no_such_function") == nullptr);
    }
    test_each_write_passes_once_and_out_of_order();
    test_a_full_provider_is_asked_again();
    test_nothing_is_held_while_the_caller_sleeps();
    test_a_late_refusal_is_an_error_entry();
    test_messages_keep_flags_and_fences_wait();
    test_closing_drops_what_is_held_and_nothing_else();
    test_a_provider_may_open_endpoints_while_it_writes();
    test_counts();
    std::puts("fi_shuffle: 8 tests passed");
}
