// The part of libibverbs' binary interface that this fabric uses, so that building needs no header
// of it and running needs no particular release.
//
// Source: libibverbs/verbs.h of rdma-core. Names, order and types of fields are the interface that
// every libibverbs.so.1 keeps (symbol versions IBVERBS_1.1 and newer); the sizes below hold on all
// 64-bit Linux. Structs that the library creates are declared only as far as they are read.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace weightsync::verbs {

struct ibv_context;
struct ibv_device;
struct ibv_cq;
struct ibv_qp;
struct ibv_srq;

using Gid = std::array<std::uint8_t, 16>;  // union ibv_gid, network byte order

// ---- device and port ----

struct ibv_device_attr {
    char fw_ver[64];
    std::uint64_t node_guid;
    std::uint64_t sys_image_guid;
    std::uint64_t max_mr_size;
    std::uint64_t page_size_cap;
    std::uint32_t vendor_id;
    std::uint32_t vendor_part_id;
    std::uint32_t hw_ver;
    int max_qp;
    int max_qp_wr;
    unsigned device_cap_flags;
    int max_sge;
    int max_sge_rd;
    int max_cq;
    int max_cqe;
    int max_mr;
    int max_pd;
    int unused_limits[20];  // max_qp_rd_atom .. max_srq_sge
    std::uint16_t max_pkeys;
    std::uint8_t local_ca_ack_delay;
    std::uint8_t phys_port_cnt;
};
static_assert(offsetof(ibv_device_attr, max_cqe) == 132);
static_assert(offsetof(ibv_device_attr, max_pkeys) == 224);
static_assert(sizeof(ibv_device_attr) == 232);

inline constexpr int IBV_PORT_DOWN = 1;
inline constexpr int IBV_PORT_ACTIVE = 4;
inline constexpr std::uint8_t IBV_LINK_LAYER_INFINIBAND = 1;
inline constexpr std::uint8_t IBV_LINK_LAYER_ETHERNET = 2;

struct ibv_port_attr {
    int state;
    int max_mtu;
    int active_mtu;  // 1 .. 5: 256 .. 4096 bytes
    int gid_tbl_len;
    std::uint32_t port_cap_flags;
    std::uint32_t max_msg_sz;
    std::uint32_t bad_pkey_cntr;
    std::uint32_t qkey_viol_cntr;
    std::uint16_t pkey_tbl_len;
    std::uint16_t lid;
    std::uint16_t sm_lid;
    std::uint8_t lmc;
    std::uint8_t max_vl_num;
    std::uint8_t sm_sl;
    std::uint8_t subnet_timeout;
    std::uint8_t init_type_reply;
    std::uint8_t active_width;
    std::uint8_t active_speed;
    std::uint8_t phys_state;
    std::uint8_t link_layer;
    std::uint8_t flags;
    // ibv_query_port() of the shared library fills up to here; newer fields follow.
    std::uint16_t port_cap_flags2;
    std::uint32_t reserved[4];
};
static_assert(offsetof(ibv_port_attr, max_msg_sz) == 20);
static_assert(offsetof(ibv_port_attr, link_layer) == 46);

enum ibv_event_type : int {
    IBV_EVENT_CQ_ERR,
    IBV_EVENT_QP_FATAL,
    IBV_EVENT_QP_REQ_ERR,
    IBV_EVENT_QP_ACCESS_ERR,
    IBV_EVENT_COMM_EST,
    IBV_EVENT_SQ_DRAINED,
    IBV_EVENT_PATH_MIG,
    IBV_EVENT_PATH_MIG_ERR,
    IBV_EVENT_DEVICE_FATAL,
    IBV_EVENT_PORT_ACTIVE,
    IBV_EVENT_PORT_ERR,
};

struct ibv_async_event {
    union {
        ibv_cq* cq;
        ibv_qp* qp;
        int port_num;
    } element;
    ibv_event_type event_type;
};
static_assert(sizeof(ibv_async_event) == 16);

// ---- memory, completions ----

inline constexpr int IBV_ACCESS_LOCAL_WRITE = 1;
inline constexpr int IBV_ACCESS_REMOTE_WRITE = 1 << 1;
// An optional flag: ibv_reg_mr_iova2 drops it by itself where the kernel does not know it.
inline constexpr int IBV_ACCESS_RELAXED_ORDERING = 1 << 20;

struct ibv_pd {
    ibv_context* context;
    std::uint32_t handle;
};

struct ibv_mr {
    ibv_context* context;
    ibv_pd* pd;
    void* addr;
    std::size_t length;
    std::uint32_t handle;
    std::uint32_t lkey;
    std::uint32_t rkey;
};
static_assert(offsetof(ibv_mr, lkey) == 36);

struct ibv_comp_channel {
    ibv_context* context;
    int fd;
    int refcnt;
};
static_assert(offsetof(ibv_comp_channel, fd) == 8);

struct ibv_cq {
    ibv_context* context;
    ibv_comp_channel* channel;
    void* cq_context;
    std::uint32_t handle;
    int cqe;  // entries it really has
    // more fields follow
};
static_assert(offsetof(ibv_cq, cqe) == 28);

enum ibv_wc_status : int {
    IBV_WC_SUCCESS,
    IBV_WC_LOC_LEN_ERR,
    IBV_WC_LOC_QP_OP_ERR,
    IBV_WC_LOC_EEC_OP_ERR,
    IBV_WC_LOC_PROT_ERR,
    IBV_WC_WR_FLUSH_ERR,
    IBV_WC_MW_BIND_ERR,
    IBV_WC_BAD_RESP_ERR,
    IBV_WC_LOC_ACCESS_ERR,
    IBV_WC_REM_INV_REQ_ERR,
    IBV_WC_REM_ACCESS_ERR,
    IBV_WC_REM_OP_ERR,
    IBV_WC_RETRY_EXC_ERR,
    IBV_WC_RNR_RETRY_EXC_ERR,
    IBV_WC_LOC_RDD_VIOL_ERR,
    IBV_WC_REM_INV_RD_REQ_ERR,
    IBV_WC_REM_ABORT_ERR,
    IBV_WC_INV_EECN_ERR,
    IBV_WC_INV_EEC_STATE_ERR,
    IBV_WC_FATAL_ERR,
    IBV_WC_RESP_TIMEOUT_ERR,
    IBV_WC_GENERAL_ERR,
    IBV_WC_TM_ERR,
    IBV_WC_TM_RNDV_INCOMPLETE,
};
inline constexpr int kNumStatuses = IBV_WC_TM_RNDV_INCOMPLETE + 1;

enum ibv_wc_opcode : int {
    IBV_WC_SEND = 0,
    IBV_WC_RDMA_WRITE = 1,
    IBV_WC_RECV = 1 << 7,
    IBV_WC_RECV_RDMA_WITH_IMM,
};

inline constexpr unsigned IBV_WC_WITH_IMM = 1U << 1;

struct ibv_wc {
    std::uint64_t wr_id;
    ibv_wc_status status;
    ibv_wc_opcode opcode;  // defined after success only
    std::uint32_t vendor_err;
    std::uint32_t byte_len;
    std::uint32_t imm_data;  // network byte order
    std::uint32_t qp_num;
    std::uint32_t src_qp;
    unsigned wc_flags;
    std::uint16_t pkey_index;
    std::uint16_t slid;
    std::uint8_t sl;
    std::uint8_t dlid_path_bits;
};
static_assert(offsetof(ibv_wc, imm_data) == 24);
static_assert(sizeof(ibv_wc) == 48);

// ---- queue pairs ----

inline constexpr int IBV_QPT_RC = 2;

struct ibv_qp_cap {
    std::uint32_t max_send_wr;
    std::uint32_t max_recv_wr;
    std::uint32_t max_send_sge;
    std::uint32_t max_recv_sge;
    std::uint32_t max_inline_data;
};

struct ibv_qp_init_attr {
    void* qp_context;
    ibv_cq* send_cq;
    ibv_cq* recv_cq;
    ibv_srq* srq;
    ibv_qp_cap cap;
    int qp_type;
    int sq_sig_all;
};
static_assert(sizeof(ibv_qp_init_attr) == 64);

enum ibv_qp_attr_mask : int {
    IBV_QP_STATE = 1 << 0,
    IBV_QP_ACCESS_FLAGS = 1 << 3,
    IBV_QP_PKEY_INDEX = 1 << 4,
    IBV_QP_PORT = 1 << 5,
    IBV_QP_AV = 1 << 7,
    IBV_QP_PATH_MTU = 1 << 8,
    IBV_QP_TIMEOUT = 1 << 9,
    IBV_QP_RETRY_CNT = 1 << 10,
    IBV_QP_RNR_RETRY = 1 << 11,
    IBV_QP_RQ_PSN = 1 << 12,
    IBV_QP_MAX_QP_RD_ATOMIC = 1 << 13,
    IBV_QP_MIN_RNR_TIMER = 1 << 15,
    IBV_QP_SQ_PSN = 1 << 16,
    IBV_QP_MAX_DEST_RD_ATOMIC = 1 << 17,
    IBV_QP_DEST_QPN = 1 << 20,
};

enum ibv_qp_state : int {
    IBV_QPS_RESET,
    IBV_QPS_INIT,
    IBV_QPS_RTR,
    IBV_QPS_RTS,
    IBV_QPS_SQD,
    IBV_QPS_SQE,
    IBV_QPS_ERR,
};

struct ibv_global_route {
    Gid dgid;
    std::uint32_t flow_label;
    std::uint8_t sgid_index;
    std::uint8_t hop_limit;
    std::uint8_t traffic_class;
};

struct ibv_ah_attr {
    alignas(8) ibv_global_route grh;  // ibv_gid holds 64-bit numbers
    std::uint16_t dlid;
    std::uint8_t sl;
    std::uint8_t src_path_bits;
    std::uint8_t static_rate;
    std::uint8_t is_global;
    std::uint8_t port_num;
};
static_assert(offsetof(ibv_ah_attr, dlid) == 24);
static_assert(sizeof(ibv_ah_attr) == 32);

struct ibv_qp_attr {
    ibv_qp_state qp_state;
    ibv_qp_state cur_qp_state;
    int path_mtu;
    int path_mig_state;
    std::uint32_t qkey;
    std::uint32_t rq_psn;
    std::uint32_t sq_psn;
    std::uint32_t dest_qp_num;
    unsigned qp_access_flags;
    ibv_qp_cap cap;
    ibv_ah_attr ah_attr;
    ibv_ah_attr alt_ah_attr;
    std::uint16_t pkey_index;
    std::uint16_t alt_pkey_index;
    std::uint8_t en_sqd_async_notify;
    std::uint8_t sq_draining;
    std::uint8_t max_rd_atomic;
    std::uint8_t max_dest_rd_atomic;
    std::uint8_t min_rnr_timer;
    std::uint8_t port_num;
    std::uint8_t timeout;
    std::uint8_t retry_cnt;
    std::uint8_t rnr_retry;
    std::uint8_t alt_port_num;
    std::uint8_t alt_timeout;
    std::uint32_t rate_limit;
};
static_assert(offsetof(ibv_qp_attr, ah_attr) == 56);
static_assert(offsetof(ibv_qp_attr, pkey_index) == 120);
static_assert(sizeof(ibv_qp_attr) == 144);

enum ibv_wr_opcode : int {
    IBV_WR_RDMA_WRITE,
    IBV_WR_RDMA_WRITE_WITH_IMM,
    IBV_WR_SEND,
    IBV_WR_SEND_WITH_IMM,
};

inline constexpr unsigned IBV_SEND_SIGNALED = 1U << 1;

struct ibv_sge {
    std::uint64_t addr;
    std::uint32_t length;
    std::uint32_t lkey;
};
static_assert(sizeof(ibv_sge) == 16);

struct ibv_send_wr {
    std::uint64_t wr_id;
    ibv_send_wr* next;
    ibv_sge* sg_list;
    int num_sge;
    ibv_wr_opcode opcode;
    unsigned send_flags;
    std::uint32_t imm_data;  // network byte order
    struct {
        std::uint64_t remote_addr;
        std::uint32_t rkey;
        std::uint64_t reserved[2];  // the union's larger members: atomics
    } rdma;
    std::uint64_t xrc;          // union qp_type
    std::uint64_t reserved[6];  // bind_mw, tso
};
static_assert(offsetof(ibv_send_wr, imm_data) == 36);
static_assert(offsetof(ibv_send_wr, rdma) == 40);
static_assert(sizeof(ibv_send_wr) == 128);

struct ibv_recv_wr {
    std::uint64_t wr_id;
    ibv_recv_wr* next;
    ibv_sge* sg_list;
    int num_sge;
};
static_assert(sizeof(ibv_recv_wr) == 32);

struct ibv_qp {
    ibv_context* context;
    void* qp_context;
    ibv_pd* pd;
    ibv_cq* send_cq;
    ibv_cq* recv_cq;
    ibv_srq* srq;
    std::uint32_t handle;
    std::uint32_t qp_num;
    // more fields follow
};
static_assert(offsetof(ibv_qp, qp_num) == 52);

// ---- context: posting and polling go through its table, not through symbols ----

struct ibv_context_ops {
    void* compat_before_poll[11];  // query_device .. create_cq
    int (*poll_cq)(ibv_cq* cq, int num_entries, ibv_wc* wc);
    int (*req_notify_cq)(ibv_cq* cq, int solicited_only);
    void* compat_before_send[12];  // cq_event .. destroy_qp, with post_srq_recv
    int (*post_send)(ibv_qp* qp, ibv_send_wr* wr, ibv_send_wr** bad_wr);
    int (*post_recv)(ibv_qp* qp, ibv_recv_wr* wr, ibv_recv_wr** bad_wr);
    void* compat_rest[5];  // create_ah .. async_event
};
static_assert(offsetof(ibv_context_ops, poll_cq) == 11 * sizeof(void*));
static_assert(offsetof(ibv_context_ops, post_send) == 25 * sizeof(void*));
static_assert(sizeof(ibv_context_ops) == 32 * sizeof(void*));

struct ibv_context {
    ibv_device* device;
    ibv_context_ops ops;
    int cmd_fd;
    int async_fd;
    int num_comp_vectors;
    // more fields follow
};
static_assert(offsetof(ibv_context, async_fd) == 33 * sizeof(void*) + 4);

}  // namespace weightsync::verbs
