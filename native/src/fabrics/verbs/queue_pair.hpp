// One reliable connection of one rail: queue pair, its states, what its peer must know of it.
#pragma once

#include <cstdint>
#include <memory>

#include "device.hpp"

namespace weightsync::verbs {

// What an administrator may have to choose; the defaults suit lossless RoCEv2 and InfiniBand.
struct PathOptions {
    int gid_index = -1;              // -1: see choose_gid()
    std::uint16_t pkey = 0xFFFF;     // found in the port's table; the top bit is ignored
    std::uint8_t traffic_class = 0;  // of RoCEv2 packets and InfiniBand routes
    std::uint8_t service_level = 0;
    int mtu_bytes = 0;          // 0: what the port runs with
    std::uint8_t timeout = 14;  // 4.096 us * 2^timeout for an acknowledgement: 67 ms
    std::uint8_t retry_count = 7;
};

// One end of a connection, as the other end needs it. Travels.
struct Endpoint {
    Gid gid{};
    std::uint32_t qp_num = 0;
    std::uint32_t psn = 0;
    std::uint16_t lid = 0;
    std::uint8_t mtu = 0;         // code 1 .. 5
    std::uint8_t link_layer = 0;  // IBV_LINK_LAYER_*
};
static_assert(sizeof(Endpoint) == 28);

// An open port with what the device can do.
struct Port {
    PortFacts facts;
    PathOptions options;
    std::uint8_t number = 0;
    std::uint8_t sgid_index = 0;
    std::uint16_t pkey_index = 0;
    ibv_device_attr device{};
    ibv_port_attr attr{};
    Gid gid{};

    [[nodiscard]] std::uint8_t mtu() const noexcept;
};

// Reads limits and tables of the port. Throws kConfig for options that it cannot meet, kRail when
// it is not active.
[[nodiscard]] Port open_port(const Context& context, const PortFacts& facts,
                             const PathOptions& options);

struct QueueSizes {
    std::uint32_t num_sends = 0;
    std::uint32_t num_receives = 0;
    [[nodiscard]] std::uint32_t total() const noexcept { return num_sends + num_receives; }
};

// Used by one thread, except for the destructor. Posting does not check depths: its users count.
class QueuePair {
  public:
    // Reserves its completions on `completions`, which must have them free; INIT on return, so
    // that receives can be posted.
    QueuePair(std::shared_ptr<ProtectionDomain> domain,
              std::shared_ptr<CompletionQueue> completions, const Port& port, QueueSizes sizes);
    ~QueuePair();
    QueuePair(const QueuePair&) = delete;
    QueuePair& operator=(const QueuePair&) = delete;

    [[nodiscard]] const Endpoint& local() const noexcept { return local_; }
    // To RTR and RTS. Throws kConfig when the ends do not fit together, kQueuePair else.
    void connect(const Port& port, const Endpoint& peer);
    // To ERR: nothing new is sent or taken in; what was posted completes with errors.
    void stop() noexcept;
    // To RESET: after it returns neither memory is touched through it. Reports failures; false
    // then.
    bool reset() noexcept;

    // 0 or an errno; `failed` is the first request that was not taken then.
    [[nodiscard]] int post_send(ibv_send_wr* chain, ibv_send_wr** failed) noexcept {
        return raw_->context->ops.post_send(raw_, chain, failed);
    }
    [[nodiscard]] int post_receive(ibv_recv_wr* chain, ibv_recv_wr** failed) noexcept {
        return raw_->context->ops.post_recv(raw_, chain, failed);
    }

  private:
    void destroy() noexcept;
    [[nodiscard]] int modify(ibv_qp_attr& attr, int mask) noexcept;
    void move_to(const char* state, ibv_qp_attr& attr, int mask);

    std::shared_ptr<ProtectionDomain> domain_;
    std::shared_ptr<CompletionQueue> completions_;
    QueueSizes sizes_;
    ibv_qp* raw_ = nullptr;
    Endpoint local_;
};

}  // namespace weightsync::verbs
