#include "queue_pair.hpp"

#include <algorithm>
#include <bit>
#include <cerrno>

namespace weightsync::verbs {

namespace {

constexpr std::uint32_t kPsnMask = (1U << 24) - 1;
constexpr std::uint8_t kMinRnrTimer = 12;  // 0.64 ms; credits make it a matter of bugs only
constexpr std::uint8_t kRetryForEver = 7;  // receiver not ready
constexpr std::uint8_t kHopLimit = 64;
constexpr int kMinMtuBytes = 256;

std::uint16_t find_pkey(const Context& context, const ibv_port_attr& attr, std::uint8_t port,
                        std::uint16_t wanted) {
    constexpr std::uint16_t kMembership = 0x8000;  // full or limited: either will do
    for (int i = 0; i < attr.pkey_tbl_len; ++i) {
        std::uint16_t pkey = 0;
        if (context.table().query_pkey(context.get(), port, i, &pkey) != 0) {
            break;
        }
        const auto native = static_cast<std::uint16_t>(pkey << 8 | pkey >> 8);
        if ((native | kMembership) == (wanted | kMembership)) {
            return static_cast<std::uint16_t>(i);
        }
    }
    throw Error(Scope::kConfig, "port " + std::to_string(port) + " of " + context.device() +
                                    " has no partition key " + std::to_string(wanted) +
                                    "; see /sys/class/infiniband/" + context.device() + "/ports/" +
                                    std::to_string(port) + "/pkeys");
}

// 256 .. 4096 bytes as the code 1 .. 5.
std::uint8_t mtu_code(int nbytes) {
    const auto value = static_cast<unsigned>(nbytes);
    if (nbytes < kMinMtuBytes || nbytes > 4096 || !std::has_single_bit(value)) {
        throw Error(Scope::kConfig,
                    "mtu_bytes=" + std::to_string(nbytes) + ": give 256, 512, 1024, 2048 or 4096");
    }
    return static_cast<std::uint8_t>(std::countr_zero(value) - 7);
}

}  // namespace

std::uint8_t Port::mtu() const noexcept {
    return static_cast<std::uint8_t>(attr.active_mtu);
}

Port open_port(const Context& context, const PortFacts& facts, const PathOptions& options) {
    Port port;
    port.facts = facts;
    port.options = options;
    port.number = static_cast<std::uint8_t>(facts.port);
    port.device = context.query_device();
    port.attr = context.query_port(port.number);
    const std::string label = facts.device + " port " + std::to_string(facts.port);
    if (port.attr.state != IBV_PORT_ACTIVE) {
        throw Error(Scope::kRail,
                    label +
                        " is not active; check cable and link (`ip link`, "
                        "`ibv_devinfo`)",
                    {{"rail", label}});
    }
    int index = options.gid_index;
    if (index < 0) {
        if (const GidEntry* entry = choose_gid(facts); entry != nullptr) {
            index = entry->index;
        } else if (port.attr.link_layer == IBV_LINK_LAYER_INFINIBAND) {
            index = 0;
        } else {
            throw Error(Scope::kConfig, label + " has no RoCEv2 GID: give its network interface " +
                                            facts.interface + " an IP address");
        }
    }
    if (index >= port.attr.gid_tbl_len || index > 255) {
        throw Error(Scope::kConfig, label + " has no GID " + std::to_string(index) +
                                        "; its table has " + std::to_string(port.attr.gid_tbl_len));
    }
    port.sgid_index = static_cast<std::uint8_t>(index);
    const int error = context.table().query_gid(context.get(), port.number, index, &port.gid);
    if (error != 0) {
        throw verbs_error("ibv_query_gid " + label, errno == 0 ? EIO : errno);
    }
    if (std::ranges::all_of(port.gid, [](std::uint8_t byte) { return byte == 0; })) {
        throw Error(Scope::kConfig, "GID " + std::to_string(index) + " of " + label + " is empty");
    }
    port.pkey_index = find_pkey(context, port.attr, port.number, options.pkey);
    if (options.mtu_bytes != 0) {
        port.attr.active_mtu =
            std::min(port.attr.active_mtu, static_cast<int>(mtu_code(options.mtu_bytes)));
    }
    return port;
}

QueuePair::QueuePair(std::shared_ptr<ProtectionDomain> domain,
                     std::shared_ptr<CompletionQueue> completions, const Port& port,
                     QueueSizes sizes)
    : domain_(std::move(domain)), completions_(std::move(completions)), sizes_(sizes) {
    if (!completions_->reserve(sizes_.total())) {
        throw Error(Scope::kInternal, "a queue pair would overrun its completion queue");
    }
    ibv_qp_init_attr init{};
    init.send_cq = completions_->get();
    init.recv_cq = completions_->get();
    init.qp_type = IBV_QPT_RC;
    init.cap = {sizes_.num_sends, sizes_.num_receives, 1, 1, 0};
    errno = 0;
    raw_ = domain_->table().create_qp(domain_->get(), &init);
    if (raw_ == nullptr) {
        const int error = errno == 0 ? EIO : errno;
        completions_->give_back(sizes_.total());
        throw verbs_error("ibv_create_qp on " + port.facts.device, error,
                          "too many connections, or `ulimit -l` is too small");
    }
    count_live(Kind::kVerbs, 1);
    local_.gid = port.gid;
    local_.lid = port.attr.lid;
    local_.mtu = port.mtu();
    local_.link_layer = port.attr.link_layer;
    local_.qp_num = raw_->qp_num;
    local_.psn = static_cast<std::uint32_t>(random_u64()) & kPsnMask;

    ibv_qp_attr attr{};
    attr.qp_state = IBV_QPS_INIT;
    attr.pkey_index = port.pkey_index;
    attr.port_num = port.number;
    attr.qp_access_flags = IBV_ACCESS_REMOTE_WRITE;
    const int error =
        modify(attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
    if (error != 0) {
        destroy();
        throw verbs_error("ibv_modify_qp to INIT", error);
    }
}

QueuePair::~QueuePair() {
    destroy();
}

void QueuePair::destroy() noexcept {
    const int error = domain_->table().destroy_qp(raw_);
    if (error != 0) {
        // Its completions may still come: the budget is lost with it.
        report("verbs fabric: ibv_destroy_qp: " + errno_text(std::abs(error)));
        return;
    }
    completions_->give_back(sizes_.total());
    count_live(Kind::kVerbs, -1);
}

int QueuePair::modify(ibv_qp_attr& attr, int mask) noexcept {
    return domain_->table().modify_qp(raw_, &attr, mask);
}

void QueuePair::move_to(const char* state, ibv_qp_attr& attr, int mask) {
    if (const int error = modify(attr, mask); error != 0) {
        throw os_error(Scope::kQueuePair, std::string("ibv_modify_qp to ") + state, std::abs(error),
                       "is there a route between the two ports, and is the GID the right one?");
    }
}

void QueuePair::connect(const Port& port, const Endpoint& peer) {
    if (peer.link_layer != local_.link_layer) {
        throw Error(Scope::kConfig, port.facts.device +
                                        " and the peer's port differ: one is InfiniBand, one "
                                        "Ethernet; choose devices that match");
    }
    if (peer.mtu < 1 || peer.mtu > 5) {
        throw Error(Scope::kConfig, "the peer's port has an impossible MTU");
    }
    ibv_qp_attr ready{};
    ready.qp_state = IBV_QPS_RTR;
    ready.path_mtu = std::min(peer.mtu, local_.mtu);
    ready.dest_qp_num = peer.qp_num;
    ready.rq_psn = peer.psn & kPsnMask;
    ready.max_dest_rd_atomic = 1;  // nobody reads, and some devices refuse 0
    ready.min_rnr_timer = kMinRnrTimer;
    ready.ah_attr.dlid = peer.lid;
    ready.ah_attr.sl = port.options.service_level;
    ready.ah_attr.port_num = port.number;
    ready.ah_attr.is_global = 1;
    ready.ah_attr.grh.dgid = peer.gid;
    ready.ah_attr.grh.sgid_index = port.sgid_index;
    ready.ah_attr.grh.hop_limit = kHopLimit;
    ready.ah_attr.grh.traffic_class = port.options.traffic_class;
    move_to("RTR", ready,
            IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);

    ibv_qp_attr send{};
    send.qp_state = IBV_QPS_RTS;
    send.timeout = port.options.timeout;
    send.retry_cnt = port.options.retry_count;
    send.rnr_retry = kRetryForEver;
    send.sq_psn = local_.psn;
    send.max_rd_atomic = 1;
    move_to("RTS", send,
            IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
                IBV_QP_MAX_QP_RD_ATOMIC);
}

void QueuePair::stop() noexcept {
    ibv_qp_attr attr{};
    attr.qp_state = IBV_QPS_ERR;
    // A failure is no news: reset() comes next, and says so.
    [[maybe_unused]] const int error = modify(attr, IBV_QP_STATE);
}

bool QueuePair::reset() noexcept {
    ibv_qp_attr attr{};
    attr.qp_state = IBV_QPS_RESET;
    const int error = modify(attr, IBV_QP_STATE);
    if (error != 0) {
        report("verbs fabric: ibv_modify_qp to RESET: " + errno_text(std::abs(error)));
    }
    return error == 0;
}

}  // namespace weightsync::verbs
