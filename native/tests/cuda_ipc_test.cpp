// What a sink of fabric cuda_ipc believes of what a source says. The driver is a table of functions
// here; tests/contract/test_cuda_ipc.py has a whole one.
#include <cerrno>
#include <cstring>
#include <map>

#include "../src/fabrics/cuda_ipc/sink_memory.hpp"
#include "check.hpp"

namespace weightsync {
namespace {

using cuda_ipc::Allocation;
using cuda_ipc::GpuSinkMemory;
using cuda_ipc::Place;
using cuda_ipc::Region;
using cuda_ipc::Regions;

constexpr std::uint64_t kImported = 0x7000'0000;  // where the first handle is opened
constexpr int kInvalid = 1;

struct FakeIpc {
    std::map<std::uint64_t, std::uint64_t> open;  // address -> bytes
    std::uint64_t next = kImported;
    int num_current = 0;
};
FakeIpc fake_ipc;

// The first bytes of a handle are the size of what it names.
cuda::Driver ipc_driver() {
    cuda::Driver driver;
    driver.pointer_get_attribute = [](void*, int, std::uint64_t) { return kInvalid; };
    driver.device_primary_ctx_retain = [](void** context, int) {
        *context = &fake_ipc;
        return 0;
    };
    driver.device_primary_ctx_release = [](int) { return 0; };
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
        return 0;
    };
    driver.ipc_close_mem_handle = [](std::uint64_t pointer) {
        return fake_ipc.open.erase(pointer) == 1 ? 0 : kInvalid;
    };
    return driver;
}

Allocation allocation_of(std::uint64_t base, std::uint64_t nbytes, std::uint64_t id,
                         std::uint64_t real_nbytes) {
    Allocation allocation{base, nbytes, id, {}};
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

TEST(a_sink_opens_what_is_new_and_closes_what_is_gone) {
    const cuda::Driver driver = ipc_driver();
    fake_ipc = {};
    {
        GpuSinkMemory memory(driver, {});
        auto first =
            open_all(memory, {allocation_of(0x1000, 64, 1, 64), allocation_of(0x8000, 32, 2, 4096)},
                     nullptr);
        CHECK(first.error == 0 && fake_ipc.open.size() == 2);
        // One stays, one was freed and another allocation is where it was.
        auto second =
            open_all(memory, {allocation_of(0x8000, 32, 2, 4096), allocation_of(0x1000, 64, 3, 64)},
                     first.imports);
        CHECK(second.error == 0 && fake_ipc.open.size() == 3);
        first.imports.reset();  // of the last batch that read it
        CHECK(fake_ipc.open.size() == 2 && fake_ipc.open.count(kImported) == 0);
    }
    CHECK(fake_ipc.open.empty() && fake_ipc.num_current == 0);
}

TEST(what_a_source_says_of_its_memory_is_checked) {
    const cuda::Driver driver = ipc_driver();
    fake_ipc = {};
    GpuSinkMemory memory(driver, {});
    const auto refused = [&](const std::vector<Allocation>& all) {
        const auto opened = open_all(memory, all, nullptr);
        return opened.error != 0 && !opened.imports && fake_ipc.open.empty();
    };
    CHECK(refused({allocation_of(0x1000, 65, 1, 64)}));  // longer than it is
    CHECK(refused({allocation_of(0x1000, 64, 1, 0)}));   // a handle of nothing
    CHECK(refused({allocation_of(0x1000, 64, 1, 64), allocation_of(0x103f, 8, 2, 8)}));
    CHECK(refused({allocation_of(0x1000, 64, 1, 64), allocation_of(0x1000, 64, 1, 64)}));
    CHECK(refused({allocation_of(UINT64_MAX - 8, 64, 1, 64)}));
    const std::vector<std::byte> cut(sizeof(Allocation) - 1);
    CHECK(memory.open({1, 0}, cut, nullptr).error == EINVAL);
    CHECK(open_all(memory, {}, nullptr).error == 0);
}

}  // namespace
}  // namespace weightsync
