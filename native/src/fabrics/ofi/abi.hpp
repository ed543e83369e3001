// The part of libfabric's binary interface that this fabric uses: structs as of version 1.17
// (rdma/fabric.h, fi_domain.h, fi_endpoint.h, fi_eq.h, fi_rma.h, fi_cm.h) and symbol version
// FABRIC_1.3, which every later release still offers. Newer releases append to ops tables only;
// structs that grow are allocated by the library itself (fi_dupinfo) or given spare room here.
//
// Declared here and not included, so that building needs no libfabric and one build runs
// everywhere. Entries of ops tables that are not called are void pointers.
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <cstddef>
#include <cstdint>

namespace weightsync::ofi::abi {

inline constexpr std::uint32_t version(std::uint32_t major, std::uint32_t minor) noexcept {
    return major << 16 | minor;
}

// --- flags, enumerators and error numbers

inline constexpr std::uint64_t FI_MSG = 1ULL << 1;
inline constexpr std::uint64_t FI_RMA = 1ULL << 2;
inline constexpr std::uint64_t FI_WRITE = 1ULL << 9;
inline constexpr std::uint64_t FI_RECV = 1ULL << 10;
inline constexpr std::uint64_t FI_TRANSMIT = 1ULL << 11;
inline constexpr std::uint64_t FI_REMOTE_WRITE = 1ULL << 13;
inline constexpr std::uint64_t FI_REMOTE_CQ_DATA = 1ULL << 17;
inline constexpr std::uint64_t FI_COMPLETION = 1ULL << 24;
inline constexpr std::uint64_t FI_TRANSMIT_COMPLETE = 1ULL << 27;
inline constexpr std::uint64_t FI_DELIVERY_COMPLETE = 1ULL << 28;
inline constexpr std::uint64_t FI_LOCAL_COMM = 1ULL << 51;
inline constexpr std::uint64_t FI_REMOTE_COMM = 1ULL << 52;
inline constexpr std::uint64_t FI_SOURCE = 1ULL << 57;  // getinfo: the address is ours

inline constexpr std::uint64_t FI_CONTEXT = 1ULL << 59;   // mode: contexts are fi_context
inline constexpr std::uint64_t FI_CONTEXT2 = 1ULL << 52;  // mode: contexts are fi_context2

inline constexpr int FI_MR_LOCAL = 1 << 2;
inline constexpr int FI_MR_VIRT_ADDR = 1 << 4;
inline constexpr int FI_MR_ALLOCATED = 1 << 5;
inline constexpr int FI_MR_PROV_KEY = 1 << 6;
inline constexpr int FI_MR_ENDPOINT = 1 << 9;

inline constexpr std::uint32_t FI_ADDR_STR = 9;  // addresses are text

enum fi_ep_type : int { FI_EP_RDM = 3 };
enum fi_av_type : int { FI_AV_MAP = 1, FI_AV_TABLE = 2 };
enum fi_threading : int { FI_THREAD_SAFE = 1, FI_THREAD_DOMAIN = 3 };
enum fi_progress : int { FI_PROGRESS_AUTO = 1, FI_PROGRESS_MANUAL = 2 };
enum fi_resource_mgmt : int { FI_RM_ENABLED = 2 };
enum fi_wait_obj : int { FI_WAIT_NONE = 0, FI_WAIT_FD = 3 };
enum fi_cq_format : int { FI_CQ_FORMAT_DATA = 3 };

inline constexpr int FI_GETWAIT = 5;  // control commands
inline constexpr int FI_ENABLE = 6;

inline constexpr int FI_OPT_ENDPOINT = 0;
// Since 1.18 (rdma/fi_endpoint.h); a library that does not know them refuses them.
inline constexpr int FI_OPT_CUDA_API_PERMITTED = 10;
inline constexpr int FI_OPT_SHARED_MEMORY_PERMITTED = 11;

// Errors are negative errno values, and these.
inline constexpr int FI_ENODATA = 61;
inline constexpr int FI_EAVAIL = 259;

using fi_addr_t = std::uint64_t;

// --- attributes; owned by the library where a fi_info holds them

struct fi_tx_attr {
    std::uint64_t caps;
    std::uint64_t mode;
    std::uint64_t op_flags;
    std::uint64_t msg_order;
    std::uint64_t comp_order;
    std::size_t inject_size;
    std::size_t size;
    std::size_t iov_limit;
    std::size_t rma_iov_limit;
    std::uint32_t tclass;
};

struct fi_rx_attr {
    std::uint64_t caps;
    std::uint64_t mode;
    std::uint64_t op_flags;
    std::uint64_t msg_order;
    std::uint64_t comp_order;
    std::size_t total_buffered_recv;
    std::size_t size;
    std::size_t iov_limit;
};

struct fi_ep_attr {
    fi_ep_type type;
    std::uint32_t protocol;
    std::uint32_t protocol_version;
    std::size_t max_msg_size;
    std::size_t msg_prefix_size;
    std::size_t max_order_raw_size;
    std::size_t max_order_war_size;
    std::size_t max_order_waw_size;
    std::uint64_t mem_tag_format;
    std::size_t tx_ctx_cnt;
    std::size_t rx_ctx_cnt;
    std::size_t auth_key_size;
    std::uint8_t* auth_key;
};

struct fi_domain_attr {
    void* domain;
    char* name;
    fi_threading threading;
    fi_progress control_progress;
    fi_progress data_progress;
    fi_resource_mgmt resource_mgmt;
    fi_av_type av_type;
    int mr_mode;
    std::size_t mr_key_size;
    std::size_t cq_data_size;
    // ... never allocated here
};

struct fi_fabric_attr {
    void* fabric;
    char* name;
    char* prov_name;
    std::uint32_t prov_version;
    std::uint32_t api_version;
};

struct fi_info {
    fi_info* next;
    std::uint64_t caps;
    std::uint64_t mode;
    std::uint32_t addr_format;
    std::size_t src_addrlen;
    std::size_t dest_addrlen;
    void* src_addr;
    void* dest_addr;
    void* handle;
    fi_tx_attr* tx_attr;
    fi_rx_attr* rx_attr;
    fi_ep_attr* ep_attr;
    fi_domain_attr* domain_attr;
    fi_fabric_attr* fabric_attr;
    void* nic;
};

// --- objects

struct fid;
struct fid_fabric;
struct fid_domain;
struct fid_av;
struct fid_cq;
struct fid_ep;
struct fid_mr;

struct fi_ops {
    std::size_t size;
    int (*close)(fid* self);
    int (*bind)(fid* self, fid* other, std::uint64_t flags);
    int (*control)(fid* self, int command, void* argument);
    void* ops_open;
};

struct fid {
    std::size_t fclass;
    void* context;
    fi_ops* ops;
};

struct fi_ops_fabric {
    std::size_t size;
    int (*domain)(fid_fabric* fabric, fi_info* info, fid_domain** domain, void* context);
    void* passive_ep;
    void* eq_open;
    void* wait_open;
    int (*trywait)(fid_fabric* fabric, fid** fids, int count);
};

struct fid_fabric {
    fid base;
    fi_ops_fabric* ops;
};

struct fi_av_attr {
    fi_av_type type;
    int rx_ctx_bits;
    std::size_t count;
    std::size_t ep_per_node;
    const char* name;
    void* map_addr;
    std::uint64_t flags;
};

struct fi_ops_av {
    std::size_t size;
    int (*insert)(fid_av* av, const void* address, std::size_t count, fi_addr_t* fi_addr,
                  std::uint64_t flags, void* context);
    void* insertsvc;
    void* insertsym;
    int (*remove)(fid_av* av, fi_addr_t* fi_addr, std::size_t count, std::uint64_t flags);
};

struct fid_av {
    fid base;
    fi_ops_av* ops;
};

struct fid_mr {
    fid base;
    void* mem_desc;
    std::uint64_t key;
};

struct fi_cq_attr {
    std::size_t size;
    std::uint64_t flags;
    fi_cq_format format;
    fi_wait_obj wait_obj;
    int signaling_vector;
    int wait_cond;
    void* wait_set;
};

struct fi_cq_data_entry {
    void* op_context;
    std::uint64_t flags;
    std::size_t len;
    void* buf;
    std::uint64_t data;
};

struct fi_cq_err_entry {
    void* op_context;
    std::uint64_t flags;
    std::size_t len;
    void* buf;
    std::uint64_t data;
    std::uint64_t tag;
    std::size_t olen;
    int err;
    int prov_errno;
    void* err_data;
    std::size_t err_data_size;
    std::uint64_t spare[8];  // later releases write a source address here
};

struct fi_ops_cq {
    std::size_t size;
    ssize_t (*read)(fid_cq* cq, void* entries, std::size_t count);
    void* readfrom;
    ssize_t (*readerr)(fid_cq* cq, fi_cq_err_entry* entry, std::uint64_t flags);
    void* sread;
    void* sreadfrom;
    int (*signal)(fid_cq* cq);
    const char* (*strerror)(fid_cq* cq, int prov_errno, const void* err_data, char* text,
                            std::size_t nbytes);
};

struct fid_cq {
    fid base;
    fi_ops_cq* ops;
};

struct fi_ops_domain {
    std::size_t size;
    int (*av_open)(fid_domain* domain, fi_av_attr* attr, fid_av** av, void* context);
    int (*cq_open)(fid_domain* domain, fi_cq_attr* attr, fid_cq** cq, void* context);
    int (*endpoint)(fid_domain* domain, fi_info* info, fid_ep** ep, void* context);
};

struct fi_ops_mr {
    std::size_t size;
    int (*reg)(fid* domain, const void* address, std::size_t nbytes, std::uint64_t access,
               std::uint64_t offset, std::uint64_t requested_key, std::uint64_t flags, fid_mr** mr,
               void* context);
};

struct fid_domain {
    fid base;
    fi_ops_domain* ops;
    fi_ops_mr* mr;
};

struct fi_rma_iov {
    std::uint64_t addr;
    std::size_t len;
    std::uint64_t key;
};

struct fi_msg_rma {
    const iovec* msg_iov;
    void** desc;
    std::size_t iov_count;
    fi_addr_t addr;
    const fi_rma_iov* rma_iov;
    std::size_t rma_iov_count;
    void* context;
    std::uint64_t data;
};

struct fi_ops_rma {
    std::size_t size;
    void* read;
    void* readv;
    void* readmsg;
    void* write;
    void* writev;
    ssize_t (*writemsg)(fid_ep* ep, const fi_msg_rma* message, std::uint64_t flags);
};

struct fi_ops_ep {
    std::size_t size;
    void* cancel;
    void* getopt;
    int (*setopt)(fid* ep, int level, int option, const void* value, std::size_t nbytes);
};

struct fi_ops_cm {
    std::size_t size;
    int (*setname)(fid* ep, void* address, std::size_t nbytes);
    int (*getname)(fid* ep, void* address, std::size_t* nbytes);
};

struct fid_ep {
    fid base;
    fi_ops_ep* ops;
    fi_ops_cm* cm;
    void* msg;
    fi_ops_rma* rma;
};

struct fi_context2 {
    void* internal[8];
};

// Offsets on 64-bit machines, so that a slip shows while building.
static_assert(sizeof(void*) == 8, "declared for 64-bit machines");
static_assert(sizeof(fi_tx_attr) == 80 && sizeof(fi_rx_attr) == 64 && sizeof(fi_ep_attr) == 96);
static_assert(offsetof(fi_ep_attr, max_msg_size) == 16);
static_assert(offsetof(fi_domain_attr, mr_mode) == 36);
static_assert(offsetof(fi_domain_attr, cq_data_size) == 48);
static_assert(offsetof(fi_fabric_attr, api_version) == 28);
static_assert(offsetof(fi_info, tx_attr) == 72 && sizeof(fi_info) == 120);
static_assert(sizeof(fid) == 24 && sizeof(fi_cq_attr) == 40 && sizeof(fi_cq_data_entry) == 40);
static_assert(offsetof(fi_cq_err_entry, err) == 56 && offsetof(fi_cq_err_entry, spare) == 80);
static_assert(sizeof(fi_av_attr) == 48 && sizeof(fi_rma_iov) == 24 && sizeof(fi_msg_rma) == 64);
static_assert(offsetof(fid_ep, rma) == 48 && offsetof(fid_mr, key) == 32);

}  // namespace weightsync::ofi::abi
