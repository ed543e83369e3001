#include "pull_memory.hpp"

#include <sys/uio.h>

#include <array>
#include <cerrno>

namespace weightsync::local {

namespace {

class HostSinkMemory final : public SinkMemory {
  public:
    [[nodiscard]] std::uint64_t unit_bytes(const Imports* /*imports*/) const noexcept override {
        return std::uint64_t{4} << 20;
    }
    [[nodiscard]] Opened open(const PeerId& /*peer*/, std::span<const std::byte> /*notes*/,
                              const std::shared_ptr<const Imports>& /*before*/) override {
        return {nullptr, EINVAL};  // sources of this fabric have nothing to say
    }
    [[nodiscard]] Pulled pull(const PeerId& peer, const Imports* /*imports*/,
                              std::span<const Span> spans) noexcept override {
        return pull_from_host(peer.pid, spans);
    }
};

class HostMemory final : public PullMemory {
  public:
    [[nodiscard]] bool can_push() const noexcept override { return true; }
    void follow(LeaseTable& /*leases*/) override {}
    void unfollow(LeaseTable& /*leases*/) noexcept override {}
    void add(std::weak_ptr<Announcer> /*announcer*/) override {}
    [[nodiscard]] std::shared_ptr<const Notes> notes() const override { return nullptr; }
    [[nodiscard]] std::shared_ptr<SinkMemory> sink_memory(const TargetSpec& /*spec*/) override {
        return std::make_shared<HostSinkMemory>();
    }
    [[nodiscard]] std::string error_text(int error) const override {
        return host_error_text(error);
    }
};

}  // namespace

std::unique_ptr<PullMemory> make_host_memory() {
    return std::make_unique<HostMemory>();
}

Pulled pull_from_host(int pid, std::span<const Span> spans) noexcept {
    std::array<iovec, SinkMemory::kMaxSpans> here;
    std::array<iovec, SinkMemory::kMaxSpans> there;
    const std::size_t count = spans.size();
    for (std::size_t i = 0; i < count; ++i) {
        here[i] = {reinterpret_cast<void*>(spans[i].to), spans[i].nbytes};
        there[i] = {reinterpret_cast<void*>(spans[i].from), spans[i].nbytes};
    }
    for (std::size_t at = 0; at < count;) {
        const ssize_t got =
            ::process_vm_readv(pid, &here[at], count - at, &there[at], count - at, 0);
        if (got <= 0) {
            const int error = got < 0 ? errno : EFAULT;
            return {at, spans[at].nbytes - here[at].iov_len, error};
        }
        // A partial read stops at a whole vector or at the page that faults: go on behind it.
        auto rest = static_cast<std::size_t>(got);
        while (at < count && rest >= here[at].iov_len) {
            rest -= here[at++].iov_len;
        }
        if (rest != 0) {
            for (iovec* part : {&here[at], &there[at]}) {
                part->iov_base = static_cast<std::byte*>(part->iov_base) + rest;
                part->iov_len -= rest;
            }
        }
    }
    return {count, 0, 0};
}

std::string host_error_text(int error) {
    return errno_text(error) +
           "; is the memory still mapped, and is ptrace allowed (seccomp, CAP_SYS_PTRACE, "
           "/proc/sys/kernel/yama/ptrace_scope)?";
}

}  // namespace weightsync::local
