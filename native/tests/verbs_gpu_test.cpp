// How memory is registered: relaxed ordering, and GPU memory by a dma-buf or by its module. The GPU
// is made of host memory, and its driver is a table of functions here.
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

#include "verbs_link.hpp"

namespace weightsync {
namespace {

using namespace verbs;
using namespace test;

struct FakeGpu {
    std::uint64_t begin = 0;
    std::uint64_t end = 0;
    int export_error = 0;
    int writes_ordering = 0;
    int flush_error = 0;
    int num_flushes = 0;
    int num_contexts = 0;  // that are current
};
FakeGpu fake_gpu;

int pointer_get_attribute(void* data, int attribute, std::uint64_t pointer) {
    if (pointer < fake_gpu.begin || pointer >= fake_gpu.end) {
        return 1;
    }
    switch (attribute) {
        case 1: {  // context
            void* context = &fake_gpu;
            std::memcpy(data, static_cast<void*>(&context), sizeof(context));
            return 0;
        }
        case 2: {  // memory type: device
            const unsigned type = 2;
            std::memcpy(data, &type, sizeof(type));
            return 0;
        }
        case 8:
        case 9:  // managed, device
            std::memset(data, 0, sizeof(int));
            return 0;
        default:
            return 1;
    }
}

int export_range(void* handle, std::uint64_t pointer, std::size_t nbytes, int type,
                 std::uint64_t /*flags*/) {
    const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
    if (fake_gpu.export_error != 0) {
        return fake_gpu.export_error;
    }
    if (type != 1 || pointer % page != 0 || nbytes % page != 0 || pointer < fake_gpu.begin ||
        pointer + nbytes > fake_gpu.end) {
        return 1;
    }
    const int fd = ::memfd_create("fake-gpu", MFD_CLOEXEC);
    std::memcpy(handle, &fd, sizeof(fd));
    return fd < 0 ? 1 : 0;
}

cuda::Driver fake_driver() {
    cuda::Driver driver;
    driver.pointer_get_attribute = &pointer_get_attribute;
    driver.device_get_attribute = [](int* value, int attribute, int /*device*/) {
        *value = attribute == 118 ? fake_gpu.writes_ordering : 0;
        return 0;
    };
    driver.ctx_push_current = [](void* context) {
        ++fake_gpu.num_contexts;
        return context == &fake_gpu ? 0 : 1;
    };
    driver.ctx_pop_current = [](void** /*context*/) {
        --fake_gpu.num_contexts;
        return 0;
    };
    driver.mem_get_handle_for_address_range = &export_range;
    driver.flush_gpu_direct_rdma_writes = [](int target, int scope) {
        ++fake_gpu.num_flushes;
        return target == 0 && scope == 100 && fake_gpu.num_contexts == 1 ? fake_gpu.flush_error : 1;
    };
    return driver;
}

// Whole pages, as a GPU's driver hands them out.
class GpuPages {
  public:
    explicit GpuPages(std::size_t nbytes)
        : nbytes_(nbytes),
          data_(static_cast<std::byte*>(::mmap(nullptr, nbytes, PROT_READ | PROT_WRITE,
                                               MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {
        fake_gpu = {};
        fake_gpu.begin = reinterpret_cast<std::uint64_t>(data_);
        fake_gpu.end = fake_gpu.begin + nbytes;
    }
    ~GpuPages() {
        ::munmap(data_, nbytes_);
        fake_gpu = {};
    }
    GpuPages(const GpuPages&) = delete;
    GpuPages& operator=(const GpuPages&) = delete;
    [[nodiscard]] std::byte* data() const noexcept { return data_; }
    [[nodiscard]] std::uint64_t address() const noexcept { return fake_gpu.begin; }

  private:
    std::size_t nbytes_;
    std::byte* data_;
};

constexpr std::size_t kGpuBytes = 1U << 16;

// What registering GPU memory says; empty when it works.
std::string try_to_register(const FakeVerbs& fake, const MemoryOptions& options,
                            std::uint64_t address) {
    auto domain = std::make_shared<ProtectionDomain>(
        std::make_shared<Context>(fake.table(), "fake0"), options);
    try {
        const Registration made(domain, address, 4096, Registration::Access::kWriteRemotely);
        return {};
    } catch (const Error& error) {
        CHECK(error.scope() == Scope::kMemory);
        return error.detail();
    }
}

bool has(const std::string& text, const char* part) {
    return text.find(part) != std::string::npos;
}

TEST(verbs_relaxed_ordering_is_an_option) {
    FakeVerbs fake(1);
    std::vector<std::byte> memory(4096);
    MemoryOptions options;
    CHECK(try_to_register(fake, options, address_of(memory)).empty());
    CHECK(fake.counts().registrations == 1 && fake.counts().relaxed == 1);
    options.relaxed_ordering = false;
    CHECK(try_to_register(fake, options, address_of(memory)).empty());
    CHECK(fake.counts().registrations == 2 && fake.counts().relaxed == 1);
    // What the kernel does not take relaxed it is asked to take as it is.
    options.relaxed_ordering = true;
    fake.fail_reg_mr(1, EOPNOTSUPP);
    CHECK(try_to_register(fake, options, address_of(memory)).empty());
    CHECK(fake.counts().registrations == 3 && fake.counts().relaxed == 1);
    fake.fail_reg_mr(2, ENOMEM);
    CHECK(has(try_to_register(fake, options, address_of(memory)), "ulimit -l"));
}

TEST(verbs_gpu_memory_goes_by_a_dmabuf_else_by_its_module) {
    FakeVerbs fake(1);
    const GpuPages pages(kGpuBytes);
    const cuda::Driver driver = fake_driver();
    MemoryOptions options;
    options.gpu = &driver;
    options.sysfs = fake.sysfs();
    const std::int64_t fds = live_count(Kind::kFd);

    fake.set_gpu_memory(pages.address(), kGpuBytes, false, 0);
    CHECK(try_to_register(fake, options, pages.address() + 100).empty());  // inside a page
    CHECK(fake.counts().dmabufs == 1 && fake.counts().relaxed == 1);

    fake.set_gpu_memory(pages.address(), kGpuBytes, true, EOPNOTSUPP);
    CHECK(try_to_register(fake, options, pages.address()).empty());
    CHECK(fake.counts().dmabufs == 1 && fake.counts().registrations == 2);

    fake.set_gpu_memory(pages.address(), kGpuBytes, false, EOPNOTSUPP);
    std::string text = try_to_register(fake, options, pages.address());
    CHECK(has(text, "GPU memory on fake0") && has(text, "ibv_reg_dmabuf_mr: "));
    CHECK(has(text, "nvidia_peermem is not loaded: modprobe nvidia_peermem"));

    std::filesystem::create_directories(fake.sysfs() + "/module/nvidia_peermem");
    text = try_to_register(fake, options, pages.address());
    CHECK(has(text, "nvidia_peermem refuses"));

    fake_gpu.export_error = 801;
    text = try_to_register(fake, options, pages.address());
    CHECK(has(text, "CUDA error 801") && has(text, "open kernel modules"));

    cuda::Driver old = driver;
    old.mem_get_handle_for_address_range = nullptr;
    options.gpu = &old;
    CHECK(has(try_to_register(fake, options, pages.address()), "older than CUDA 11.7"));

    fake_gpu.export_error = 0;
    options.gpu = &driver;
    CHECK(live_count(Kind::kFd) == fds);
}

TEST(verbs_writes_to_gpu_memory_are_flushed_where_that_is_needed) {
    if (!can_meet()) {
        return;
    }
    const cuda::Driver driver = fake_driver();
    MemoryOptions options;
    options.gpu = &driver;
    for (const int ordering : {0, 100, 200}) {
        FakeVerbs fake(2);
        const GpuPages pages(kGpuBytes);
        fake_gpu.writes_ordering = ordering;
        fake.set_gpu_memory(pages.address(), kGpuBytes, false, 0);
        {
            Wired link(fake, kGpuBytes, {16}, {"fake0"}, {"fake1"}, options);
            link.target->flush();
            CHECK(fake_gpu.num_flushes == 0);  // host memory

            const auto lease = link.sink->add_lease(pages.address(), kGpuBytes, nullptr);
            RangeRequest range;
            range.nbytes = kGpuBytes;
            range.lease = lease->state();
            const auto target = link.sink->export_target({range}, std::vector{16}, 12, 2);
            const auto remote = link.source->connect(target->descriptor(), Deadline::after(kWaitS));
            remote->post(link.rows(16))->wait(Deadline::after(kWaitS));
            target->wait(kFirst, Deadline::after(kWaitS));
            target->flush();
            CHECK(fake_gpu.num_flushes == (ordering == 0 ? 1 : 0));
            CHECK(fake_gpu.num_contexts == 0);
            CHECK(std::memcmp(pages.data(), link.payload.data(), kGpuBytes) == 0);
            fake_gpu.flush_error = 700;
            if (ordering == 0) {
                CHECK(scope_of([&] { target->flush(); }) == Scope::kMemory);
            }
            // And back: the source's end reads it by a dma-buf too.
            const auto from = link.source->add_lease(pages.address(), kGpuBytes, nullptr);
            CHECK(fake.counts().dmabufs == 2);
        }
        check_rules(fake);
    }
}

TEST(verbs_a_gpu_that_cannot_be_flushed_is_refused) {
    FakeVerbs fake(1);
    const GpuPages pages(kGpuBytes);
    cuda::Driver driver = fake_driver();
    driver.flush_gpu_direct_rdma_writes = nullptr;
    GpuFlush flush;
    CHECK(scope_of([&] { flush.add(driver, pages.address()); }) == Scope::kMemory);
    fake_gpu.writes_ordering = 100;
    flush.add(driver, pages.address());
    CHECK(!flush.is_needed());
    CHECK(cuda::loaded_driver() == nullptr);  // and it is not loaded by asking
}

}  // namespace
}  // namespace weightsync
