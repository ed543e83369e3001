// Small RAII wrappers over what Linux gives: descriptors, mappings, memfds, eventfds, time.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

#include <weightsync/live.hpp>

namespace weightsync {

class UniqueFd {
  public:
    UniqueFd() noexcept = default;
    explicit UniqueFd(int fd) noexcept : fd_(fd) {
        if (fd_ >= 0) {
            count_live(Kind::kFd, 1);
        }
    }
    UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    UniqueFd& operator=(UniqueFd&& other) noexcept {
        if (this != &other) {
            reset();
            fd_ = std::exchange(other.fd_, -1);
        }
        return *this;
    }
    UniqueFd(const UniqueFd&) = delete;
    UniqueFd& operator=(const UniqueFd&) = delete;
    ~UniqueFd() { reset(); }

    [[nodiscard]] int get() const noexcept { return fd_; }
    [[nodiscard]] explicit operator bool() const noexcept { return fd_ >= 0; }
    void reset() noexcept;

  private:
    int fd_ = -1;
};

// A moment on the monotonic clock by which something must have happened.
class Deadline {
  public:
    using Clock = std::chrono::steady_clock;

    [[nodiscard]] static Deadline never() noexcept {
        return Deadline(Clock::time_point::max(), -1);
    }
    // seconds >= 0; values beyond a century mean never.
    [[nodiscard]] static Deadline after(double seconds) noexcept;

    [[nodiscard]] bool is_never() const noexcept { return end_ == Clock::time_point::max(); }
    [[nodiscard]] bool passed() const noexcept { return !is_never() && Clock::now() >= end_; }
    // Time left, at least 0 and at most `limit`.
    [[nodiscard]] std::chrono::nanoseconds remaining(std::chrono::nanoseconds limit) const noexcept;
    // The timeout this was made from, in seconds; negative for never.
    [[nodiscard]] double budget_s() const noexcept { return budget_s_; }

  private:
    Deadline(Clock::time_point end, double budget_s) noexcept : end_(end), budget_s_(budget_s) {}
    Clock::time_point end_;
    double budget_s_;
};

// "0.5 s"
[[nodiscard]] std::string seconds_text(double seconds);

// Every sleep is cut into slices of this length: after each, signals of the host language are
// looked at, and memory that a killed peer may have left without its wake-up is read again.
inline constexpr std::chrono::milliseconds kSlice{100};

// Called between slices of a blocking call, outside all locks; may throw (Ctrl-C).
using InterruptHook = void (*)();
void set_interrupt_hook(InterruptHook hook) noexcept;
void check_interrupt();

class EventFd {
  public:
    EventFd();
    explicit EventFd(UniqueFd fd) noexcept : fd_(std::move(fd)) {}
    [[nodiscard]] int get() const noexcept { return fd_.get(); }
    void signal() const noexcept;
    void drain() const noexcept;

  private:
    UniqueFd fd_;
};

// A range of this process' address space; unmapped at the end.
class Mapping : Counted<Kind::kMapping> {
  public:
    // Shared read-write mapping of a whole file. Huge pages where the kernel offers them for shared
    // memory, so the address is 2 MiB aligned when the file is at least that long.
    Mapping(int fd, std::uint64_t nbytes);
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    [[nodiscard]] std::byte* data() const noexcept { return data_; }
    [[nodiscard]] std::uint64_t nbytes() const noexcept { return nbytes_; }
    // Map every page now, so that the first write pays no fault.
    void populate() const;
    // Put another file of the same length at the same address, at once for all threads.
    void replace(int fd) const;

  private:
    std::byte* data_ = nullptr;
    std::uint64_t nbytes_ = 0;
    void* reserved_ = nullptr;
    std::uint64_t reserved_nbytes_ = 0;
};

[[nodiscard]] std::uint64_t page_bytes() noexcept;
// Length of a file that holds nbytes: whole pages, whole huge pages from 2 MiB on.
[[nodiscard]] std::uint64_t file_bytes(std::uint64_t nbytes) noexcept;

// Anonymous file of exactly nbytes that nobody can resize any more: a peer that maps it can never
// be hit by SIGBUS, and it leaves with its last user.
[[nodiscard]] UniqueFd make_memfd(const char* name, std::uint64_t nbytes);
// Give every page of a new memfd its memory, with the bytes at `contents` or zeros: a full machine
// shows as an error here and not as a signal later. `mapping` is any mapping of the file.
void fill_memfd(int fd, const Mapping& mapping, const std::byte* contents);
// Size of a memfd received from a peer; refuses one that could still shrink.
[[nodiscard]] std::uint64_t sealed_bytes(int fd);

void fill_random(std::span<std::byte> out);
[[nodiscard]] std::uint64_t random_u64();
// pidfd of the process at the other end of a unix socket, or of `pid` on older kernels.
[[nodiscard]] UniqueFd open_peer_pidfd(int socket, int pid);
// True when the process behind the pidfd has ended (zombies included).
[[nodiscard]] bool has_exited(int pidfd) noexcept;

}  // namespace weightsync
