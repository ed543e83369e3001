// What a sink of fabric cuda_ipc believes of what a source says. The driver is a table of functions
// here; tests/contract/test_cuda_ipc.py has a whole one.
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <map>

#include "../src/fabrics/cuda_ipc/sink_memory.hpp"
#include "check.hpp"

namespace weightsync {
namespace {

using cuda_ipc::Allocation;
using cuda_ipc::GpuSinkMemory;
using cuda_ipc::ImportTable;
using cuda_ipc::Place;
using cuda_ipc::Region;
using cuda_ipc::Regions;

constexpr std::uint64_t kImported = 0x7000'0000;  // where the first handle is opened
constexpr int kInvalid = 1;

struct FakeIpc {
    std::map<std::uint64_t, std::uint64_t> open;  // address -> bytes
    std::uint64_t next = kImported;
    std::size_t most_open = 0;
    int num_current = 0;
    int num_contexts = 0;
    int num_copies = 0;
    int retain_error = 0;
};
FakeIpc fake_ipc;

// The first bytes of a handle are the size of what it names.
cuda::Driver ipc_driver() {
    cuda::Driver driver;
    driver.pointer_get_attribute = [](void*, int, std::uint64_t) { return kInvalid; };
    driver.device_primary_ctx_retain = [](void** context, int) {
        *context = &fake_ipc;
        fake_ipc.num_contexts += fake_ipc.retain_error == 0 ? 1 : 0;
        return fake_ipc.retain_error;
    };
    driver.device_primary_ctx_release = [](int) {
        --fake_ipc.num_contexts;
        return 0;
    };
    driver.device_get_count = [](int* count) {
        *count = 1;
        return 0;
    };
    driver.device_get_uuid = [](cuda::Uuid* uuid, int) {
        *uuid = {};
        return 0;
    };
    driver.thread_exchange_stream_capture_mode = [](int*) { return 0; };
    driver.stream_create = [](void** stream, unsigned) {
        *stream = &fake_ipc;
        return 0;
    };
    driver.stream_destroy = [](void*) { return 0; };
    driver.stream_synchronize = [](void*) { return 0; };
    driver.memcpy_async = [](std::uint64_t, std::uint64_t source, std::size_t, void*) {
        ++fake_ipc.num_copies;
        return fake_ipc.open.contains(source) ? 0 : kInvalid;
    };
    driver.ctx_push_current = [](void*) {
        ++fake_ipc.num_current;
        return 0;
    };
    driver.ctx_pop_current = [](void**) {
        --fake_ipc.num_current;
        return 0;
    };
    driver.mem_get_address_range = [](std::uint64_t* base, std::size_t* nbytes,
                                      std::uint64_t pointer) {
        const auto found = fake_ipc.open.find(pointer);
        if (found == fake_ipc.open.end() || fake_ipc.num_current != 1) {
            return kInvalid;
        }
        *base = found->first;
        *nbytes = found->second;
        return 0;
    };
    driver.ipc_open_mem_handle = [](std::uint64_t* pointer, cuda::IpcHandle handle, unsigned) {
        std::uint64_t nbytes = 0;
        std::memcpy(&nbytes, handle.reserved.data(), sizeof(nbytes));
        if (nbytes == 0) {
            return kInvalid;
        }
        *pointer = fake_ipc.next;
        fake_ipc.next += 0x1000'0000;
        fake_ipc.open.emplace(*pointer, nbytes);
        fake_ipc.most_open = std::max(fake_ipc.most_open, fake_ipc.open.size());
        return 0;
    };
    driver.ipc_close_mem_handle = [](std::uint64_t pointer) {
        return fake_ipc.open.erase(pointer) == 1 ? 0 : kInvalid;
    };
    return driver;
}

Allocation allocation_of(std::uint64_t base, std::uint64_t nbytes, std::uint64_t id,
                         std::uint64_t real_nbytes) {
    Allocation allocation{base, nbytes, id, {}, {}};
    std::memcpy(allocation.handle.reserved.data(), &real_nbytes, sizeof(real_nbytes));
    return allocation;
}

GpuSinkMemory::Opened open_all(GpuSinkMemory& memory, const std::vector<Allocation>& all,
                               const std::shared_ptr<const local::Imports>& before) {
    const local::PeerId another{1, 0};
    return memory.open(another, std::as_bytes(std::span(all)), before);
}

TEST(regions_tell_gpu_from_host) {
    Regions regions;
    CHECK(regions.assign({{0x5000, 0x100, 0x9000}, {0x1000, 0x1000, 0x2000}}));
    const auto is = [&](std::uint64_t address, bool is_gpu, std::uint64_t at,
                        std::uint64_t nbytes) {
        const Place place = regions.find(address);
        return place.is_gpu == is_gpu && place.address == at && place.nbytes == nbytes;
    };
    CHECK(is(0xfff, false, 0xfff, 1));
    CHECK(is(0x1000, true, 0x2000, 0x1000));
    CHECK(is(0x1fff, true, 0x2fff, 1));
    CHECK(is(0x2000, false, 0x2000, 0x3000));
    CHECK(is(0x50ff, true, 0x90ff, 1));
    CHECK(is(0x5100, false, 0x5100, UINT64_MAX - 0x5100));
    // Neighbours are two; what overlaps, is empty or goes around the end is refused.
    CHECK(regions.assign({{0x1000, 0x1000, 0}, {0x2000, 1, 0}}));
    CHECK(!regions.assign({{0x1000, 0x1001, 0}, {0x2000, 1, 0}}));
    CHECK(!regions.assign({{0x1000, 1, 0}, {0x1000, 1, 0}}));
    CHECK(!regions.assign({{0x1000, 0, 0}}));
    CHECK(!regions.assign({{UINT64_MAX - 10, 11, 0}}));
    CHECK(regions.find(0x2000).is_gpu);  // as before
}

TEST(a_sink_opens_what_is_new_after_it_closed_what_is_gone) {
    const cuda::Driver driver = ipc_driver();
    fake_ipc = {};
    {
        const auto table = std::make_shared<ImportTable>();
        GpuSinkMemory memory(driver, table, {});
        const auto first =
            open_all(memory, {allocation_of(0x1000, 64, 1, 64), allocation_of(0x8000, 32, 2, 4096)},
                     nullptr);
        CHECK(first.error == 0 && fake_ipc.open.size() == 2);
        // One stays, one was freed and another allocation is where it was. A batch that still
        // holds what there was before keeps nothing open.
        const auto second =
            open_all(memory, {allocation_of(0x8000, 32, 2, 4096), allocation_of(0x1000, 64, 3, 64)},
                     first.imports);
        CHECK(second.error == 0 && fake_ipc.open.size() == 2);
        CHECK(fake_ipc.open.count(kImported) == 0 && fake_ipc.most_open == 2);
        // In another session, too.
        const auto other = open_all(memory, {allocation_of(0x1010, 64, 4, 64)}, nullptr);
        CHECK(other.error == 0 && fake_ipc.open.size() == 2 && fake_ipc.most_open == 2);
        const auto none = open_all(memory, {}, second.imports);
        CHECK(none.error == 0 && fake_ipc.open.size() == 1);
    }
    CHECK(fake_ipc.open.empty() && fake_ipc.num_current == 0 && fake_ipc.num_contexts == 0);
}

TEST(what_a_source_says_of_its_memory_is_checked) {
    const cuda::Driver driver = ipc_driver();
    fake_ipc = {};
    GpuSinkMemory memory(driver, std::make_shared<ImportTable>(), {});
    const auto refused = [&](const std::vector<Allocation>& all) {
        const auto opened = open_all(memory, all, nullptr);
        return opened.error != 0 && !opened.imports && fake_ipc.open.empty();
    };
    CHECK(fake_ipc.num_contexts == 0);                   // no GPU, no context
    CHECK(refused({allocation_of(0x1000, 65, 1, 64)}));  // longer than it is
    CHECK(refused({allocation_of(0x1000, 64, 1, 0)}));   // a handle of nothing
    CHECK(refused({allocation_of(0x1000, 64, 1, 64), allocation_of(0x103f, 8, 2, 8)}));
    CHECK(refused({allocation_of(0x1000, 64, 1, 64), allocation_of(0x1000, 64, 1, 64)}));
    CHECK(refused({allocation_of(UINT64_MAX - 8, 64, 1, 64)}));
    const std::vector<std::byte> cut(sizeof(Allocation) - 1);
    CHECK(memory.open({1, 0}, cut, nullptr).error == EINVAL);
    CHECK(open_all(memory, {}, nullptr).error == 0);
    fake_ipc.retain_error = 2;
    GpuSinkMemory other(driver, std::make_shared<ImportTable>(), {});
    CHECK(open_all(other, {allocation_of(0x1000, 64, 1, 64)}, nullptr).error == -2);
}

TEST(what_was_closed_or_lies_behind_all_addresses_is_an_error) {
    const cuda::Driver driver = ipc_driver();
    fake_ipc = {};
    GpuSinkMemory memory(driver, std::make_shared<ImportTable>(), {});
    const auto opened = open_all(memory, {allocation_of(0x1000, 64, 1, 64)}, nullptr);
    std::array<std::byte, 64> here{};
    const auto pull = [&](std::uint64_t from) {
        const local::Span span{reinterpret_cast<std::uint64_t>(here.data()), from, 16};
        return memory.pull({1, 0}, opened.imports.get(), std::span(&span, 1));
    };
    CHECK(pull(0x1000).error == 0 && pull(0x1000).num_spans == 1);
    CHECK(fake_ipc.num_copies == 2);
    CHECK(pull(UINT64_MAX).error == EFAULT);
    CHECK(open_all(memory, {}, opened.imports).error == 0);  // the source let it go
    CHECK(pull(0x1000).error == EFAULT && pull(0x1000).num_spans == 0);
    CHECK(fake_ipc.num_copies == 2 && fake_ipc.num_current == 0);
}

}  // namespace
}  // namespace weightsync
