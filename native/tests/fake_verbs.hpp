// RDMA NICs in this process, as a table of libibverbs: connections work like real ones, and every
// way in which they fail can be asked for. Breaking a rule (a full queue, a key that is not
// registered, no receive for an immediate) is counted.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <string>

#include "../src/fabrics/verbs/table.hpp"

namespace weightsync::test {

struct FakeLimits {
    int max_cqe = 32767;
    int max_qp_wr = 4096;
    std::uint32_t max_msg_sz = 8U << 20;
};

struct FakeCounts {
    std::atomic<int> full_send_queues{0};
    std::atomic<int> full_completion_queues{0};
    std::atomic<int> missing_receives{0};
    std::atomic<int> doorbells{0};
    std::atomic<int> writes{0};
    std::atomic<int> signalled{0};
    std::atomic<int> completion_queues{0};
    std::atomic<int> registrations{0};
    std::atomic<int> relaxed{0};  // of them: with relaxed ordering
    std::atomic<int> dmabufs{0};  // of them: by reg_dmabuf_mr()
};

// One at a time: the table has no place for an owner.
class FakeVerbs {
  public:
    explicit FakeVerbs(int num_devices, FakeLimits limits = {});
    ~FakeVerbs();
    FakeVerbs(const FakeVerbs&) = delete;
    FakeVerbs& operator=(const FakeVerbs&) = delete;

    [[nodiscard]] const verbs::Table& table() const noexcept;
    // A folder like /sys that shows the devices "fake0", ...
    [[nodiscard]] const std::string& sysfs() const noexcept;
    [[nodiscard]] FakeCounts& counts() noexcept;

    // The request after `skip` more on that device fails so, and its queue pair with it. With
    // `has_landed` its bytes and its immediate are at the peer all the same.
    void fail_write(int device, verbs::ibv_wc_status status, int skip, bool has_landed);
    // The immediate after `skip` more that arrives at that device fails there, and its queue pair.
    void fail_arrival(int device, verbs::ibv_wc_status status, int skip);
    // The next message (no write) from that device fails, and its queue pair.
    void fail_message(int device, verbs::ibv_wc_status status);
    // The next message, and the next receives, are not taken.
    void refuse_messages(int device, int error);
    void refuse_receives(int device, int error);
    // The next `times` doorbells are refused with that errno after `taken` requests.
    void refuse_posts(int device, int error, int times, int taken);
    // Requests wait until they are released, flushed or forgotten.
    void hold_writes(int device, bool on);
    // An asynchronous event; requests over the port fail from now on when it went down.
    void set_port(int device, bool is_up);
    // Any other event of a device, or of all its queues.
    void raise(int device, verbs::ibv_event_type type);
    // Completions of that device cannot be read.
    void fail_polls(int device, bool on);
    // That memory is a GPU's: plain registration needs its module; a dma-buf needs no errno here.
    void set_gpu_memory(std::uint64_t address, std::uint64_t nbytes, bool has_peermem,
                        int dmabuf_error);
    // The next calls of these functions fail.
    void fail_modify_qp(verbs::ibv_qp_state state, int times);
    void fail_destroy_qp(int times);
    void fail_create_qp(int times);
    void fail_reg_mr(int times, int error);
};

}  // namespace weightsync::test
