#include <weightsync/os.hpp>

#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <vector>

#include <weightsync/error.hpp>
#include <weightsync/wait.hpp>

// Newer than the headers of glibc 2.36.
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif
#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif

namespace weightsync {

namespace {

constexpr std::uint64_t kHugePage = std::uint64_t{2} << 20;

constexpr std::uint64_t round_up(std::uint64_t value, std::uint64_t step) noexcept {
    return (value + step - 1) / step * step;
}

std::atomic<InterruptHook> interrupt_hook{nullptr};

Error no_memory(std::string_view call, int error, std::uint64_t nbytes) {
    return os_error(Scope::kMemory, call, error,
                    "not enough memory for " + std::to_string(nbytes) +
                        " bytes: check `free -g` and the cgroup's memory limit");
}

// Whether shared memory gets huge pages here where it is advised.
bool has_huge_shmem() {
    static const bool has = [] {
        std::ifstream file("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
        std::string line;
        return std::getline(file, line) && line.find("[never]") == std::string::npos &&
               line.find("[deny]") == std::string::npos;
    }();
    return has;
}

}  // namespace

void UniqueFd::reset() noexcept {
    if (fd_ >= 0) {
        // Linux frees the descriptor whatever close returns: never retried.
        if (::close(fd_) != 0 && errno != EINTR) {
            report("closing a descriptor failed: " + errno_text(errno));
        }
        fd_ = -1;
        count_live(Kind::kFd, -1);
    }
}

Deadline Deadline::after(double seconds) noexcept {
    constexpr double kCentury_s = 3.2e9;
    if (!(seconds < kCentury_s)) {
        return never();
    }
    const auto wait = std::chrono::duration_cast<Clock::duration>(
        std::chrono::duration<double>(std::max(seconds, 0.0)));
    return Deadline(Clock::now() + wait, seconds);
}

std::chrono::nanoseconds Deadline::remaining(std::chrono::nanoseconds limit) const noexcept {
    if (is_never()) {
        return limit;
    }
    const std::chrono::nanoseconds left = end_ - Clock::now();
    return std::clamp(left, std::chrono::nanoseconds{0}, limit);
}

std::string seconds_text(double seconds) {
    std::array<char, 32> text{};
    std::snprintf(text.data(), text.size(), "%.3g s", seconds);
    return text.data();
}

void set_interrupt_hook(InterruptHook hook) noexcept {
    interrupt_hook.store(hook);
}

void check_interrupt() {
    if (const InterruptHook hook = interrupt_hook.load()) {
        hook();
    }
}

void futex_sleep(const std::atomic<std::uint32_t>& word, std::uint32_t expected,
                 std::chrono::nanoseconds timeout) noexcept {
    const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(timeout);
    timespec time{};
    time.tv_sec = seconds.count();
    time.tv_nsec = (timeout - seconds).count();
    // Not FUTEX_PRIVATE: the word may be shared between processes. Spurious returns are fine.
    ::syscall(SYS_futex, &word, FUTEX_WAIT, expected, &time, nullptr, 0);
}

void futex_wake_all(const std::atomic<std::uint32_t>& word) noexcept {
    constexpr int kEveryone = 0x7fffffff;
    ::syscall(SYS_futex, &word, FUTEX_WAKE, kEveryone, nullptr, nullptr, 0);
}

EventFd::EventFd() : fd_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (!fd_) {
        throw os_error(Scope::kMemory, "eventfd", errno, "check `ulimit -n`");
    }
}

void EventFd::signal() const noexcept {
    const std::uint64_t one = 1;
    // EAGAIN means that the counter is full, and then the reader is awake anyway.
    [[maybe_unused]] const auto rc = ::write(fd_.get(), &one, sizeof(one));
}

void EventFd::drain() const noexcept {
    std::uint64_t count = 0;
    [[maybe_unused]] const auto rc = ::read(fd_.get(), &count, sizeof(count));
}

std::uint64_t page_bytes() noexcept {
    static const auto size = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
    return size;
}

std::uint64_t file_bytes(std::uint64_t nbytes) noexcept {
    const std::uint64_t least = std::max<std::uint64_t>(nbytes, 1);
    return round_up(least, least >= kHugePage ? kHugePage : page_bytes());
}

Mapping::Mapping(int fd, std::uint64_t nbytes) : nbytes_(nbytes) {
    const bool wants_huge = nbytes >= kHugePage;
    reserved_nbytes_ = round_up(nbytes, page_bytes()) + (wants_huge ? kHugePage : 0);
    reserved_ = ::mmap(nullptr, reserved_nbytes_, PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved_ == MAP_FAILED) {
        throw os_error(Scope::kMemory, "mmap", errno, "check `ulimit -v`");
    }
    auto address = reinterpret_cast<std::uintptr_t>(reserved_);
    if (wants_huge) {
        address = round_up(address, kHugePage);
    }
    data_ = reinterpret_cast<std::byte*>(address);
    if (::mmap(data_, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) ==
        MAP_FAILED) {
        const int error = errno;
        ::munmap(reserved_, reserved_nbytes_);
        throw os_error(Scope::kMemory, "mmap", error, "check `ulimit -v` and free memory");
    }
    if (wants_huge) {
        // Only advice: without it the same bytes move over small pages.
        ::madvise(data_, nbytes, MADV_HUGEPAGE);
    }
}

Mapping::~Mapping() {
    if (::munmap(reserved_, reserved_nbytes_) != 0) {
        report("unmapping " + std::to_string(nbytes_) + " bytes failed: " + errno_text(errno));
    }
}

void Mapping::populate() const {
    // Reading maps sixteen pages of a file with one fault, writing one; both leave them writable.
    if (::madvise(data_, nbytes_, MADV_POPULATE_READ) == 0) {
        return;
    }
    if (errno == EINVAL) {  // before Linux 5.14: touch them by hand
        for (std::uint64_t at = 0; at < nbytes_; at += page_bytes()) {
            [[maybe_unused]] const std::byte touched =
                *static_cast<const volatile std::byte*>(data_ + at);
        }
        return;
    }
    throw no_memory("madvise(MADV_POPULATE_READ)", errno, nbytes_);
}

void Mapping::replace(int fd) const {
    if (::mmap(data_, nbytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) ==
        MAP_FAILED) {
        throw os_error(Scope::kMemory, "mmap", errno, "check free memory");
    }
    if (nbytes_ >= kHugePage) {
        ::madvise(data_, nbytes_, MADV_HUGEPAGE);
    }
}

UniqueFd make_memfd(const char* name, std::uint64_t nbytes) {
    constexpr unsigned kFlags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
    int raw = ::memfd_create(name, kFlags | MFD_NOEXEC_SEAL);
    if (raw < 0 && errno == EINVAL) {  // before Linux 6.3
        raw = ::memfd_create(name, kFlags);
    }
    UniqueFd fd(raw);
    if (!fd) {
        throw os_error(Scope::kMemory, "memfd_create", errno, "check `ulimit -n` and seccomp");
    }
    if (::ftruncate(fd.get(), static_cast<off_t>(nbytes)) != 0) {
        throw os_error(Scope::kMemory, "ftruncate", errno,
                       "asked for " + std::to_string(nbytes) + " bytes; check `ulimit -f`");
    }
    if (::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
        throw os_error(Scope::kMemory, "fcntl(F_ADD_SEALS)", errno, "");
    }
    return fd;
}

void fill_memfd(int fd, const Mapping& mapping, const std::byte* contents) {
    if (has_huge_shmem() && mapping.nbytes() >= kHugePage &&
        ::madvise(mapping.data(), mapping.nbytes(), MADV_POPULATE_WRITE) == 0) {
        if (contents != nullptr) {
            std::memcpy(mapping.data(), contents, mapping.nbytes());
        }
        return;
    }
    // Small pages: a system call for many is cheaper than a fault for each.
    constexpr std::uint64_t kStep = std::uint64_t{1} << 20;
    static const std::vector<std::byte> zeros(kStep);
    for (std::uint64_t at = 0; at < mapping.nbytes();) {
        const std::uint64_t count = std::min(kStep, mapping.nbytes() - at);
        const ssize_t done = ::pwrite(fd, contents == nullptr ? zeros.data() : contents + at, count,
                                      static_cast<off_t>(at));
        if (done < 0 && errno != EINTR) {
            throw no_memory("pwrite to a memfd", errno, mapping.nbytes());
        }
        at += done < 0 ? 0 : static_cast<std::uint64_t>(done);
    }
}

std::uint64_t sealed_bytes(int fd) {
    const int seals = ::fcntl(fd, F_GET_SEALS);
    struct stat info{};
    if (seals < 0 || (seals & F_SEAL_SHRINK) == 0 || ::fstat(fd, &info) != 0) {
        throw Error(Scope::kMemory, "a peer sent memory that it could still shrink; refused");
    }
    return static_cast<std::uint64_t>(info.st_size);
}

void fill_random(std::span<std::byte> out) {
    while (!out.empty()) {
        const ssize_t got = ::getrandom(out.data(), out.size(), 0);
        if (got < 0) {
            if (errno == EINTR) {
                continue;
            }
            throw os_error(Scope::kInternal, "getrandom", errno, "");
        }
        out = out.subspan(static_cast<std::size_t>(got));
    }
}

std::uint64_t random_u64() {
    std::uint64_t value = 0;
    fill_random(std::as_writable_bytes(std::span(&value, 1)));
    return value;
}

UniqueFd open_peer_pidfd(int socket, int pid) {
    // From the socket it cannot name a process that took over the number of one that died.
    int raw = -1;
    socklen_t length = sizeof(raw);
    if (::getsockopt(socket, SOL_SOCKET, SO_PEERPIDFD, &raw, &length) == 0) {
        return UniqueFd(raw);
    }
    raw = static_cast<int>(::syscall(SYS_pidfd_open, pid, 0));
    if (raw < 0) {
        const int error = errno;
        throw os_error(
            error == ESRCH ? Scope::kPeer : Scope::kMemory, "pidfd_open", error,
            "the peer (pid " + std::to_string(pid) + ") must run in the same pid namespace");
    }
    return UniqueFd(raw);
}

bool has_exited(int pidfd) noexcept {
    pollfd poll_fd{pidfd, POLLIN, 0};
    return ::poll(&poll_fd, 1, 0) > 0;
}

}  // namespace weightsync
