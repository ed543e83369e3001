// The part of libfabric's binary interface that fi_shuffle touches, so that no libfabric headers
// are needed to build it. Names and order are those of <rdma/fabric.h> and its neighbours (API 1.0
// on; tables only ever grow at their end, and each says its own size). fi_abi_check.cpp compares
// this with the real headers where they are installed.
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <cstddef>
#include <cstdint>

namespace fi {

using fi_addr_t = std::uint64_t;

inline constexpr std::uint64_t FI_RMA = 1ULL << 2;
inline constexpr std::uint64_t FI_WRITE = 1ULL << 9;
inline constexpr std::uint64_t FI_TRANSMIT = 1ULL << 11;
inline constexpr std::uint64_t FI_REMOTE_CQ_DATA = 1ULL << 17;
inline constexpr std::uint64_t FI_MORE = 1ULL << 18;
inline constexpr std::uint64_t FI_FENCE = 1ULL << 21;
inline constexpr std::uint64_t FI_INJECT = 1ULL << 25;
inline constexpr int FI_EAVAIL = 259;

struct fid;
struct fid_ep;
struct fid_cq;
struct fid_domain;
struct fid_fabric;
struct fi_info;                   // never looked into
struct fi_cq_attr;                // never looked into
struct fi_fabric_attr;            // never looked into
using any_function = void (*)();  // an entry that is passed on as it is

struct fi_ops {
    std::size_t size;
    int (*close)(fid*);
    int (*bind)(fid*, fid* other, std::uint64_t flags);
    any_function control, ops_open, tostr, ops_set;
};

struct fid {
    std::size_t fclass;
    void* context;
    fi_ops* ops;
};

struct fi_ops_fabric {
    std::size_t size;
    int (*domain)(fid_fabric*, fi_info*, fid_domain**, void* context);
    any_function passive_ep, eq_open, wait_open;
    int (*trywait)(fid_fabric*, fid** fids, int count);
};

struct fid_fabric {
    struct fid fid;
    fi_ops_fabric* ops;
    std::uint32_t api_version;
};

struct fi_ops_domain {
    std::size_t size;
    any_function av_open;
    int (*cq_open)(fid_domain*, fi_cq_attr*, fid_cq**, void* context);
    int (*endpoint)(fid_domain*, fi_info*, fid_ep**, void* context);
};

struct fid_domain {
    struct fid fid;
    fi_ops_domain* ops;
    void* mr;
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
};

struct fi_ops_cq {
    std::size_t size;
    ssize_t (*read)(fid_cq*, void* buffer, std::size_t count);
    ssize_t (*readfrom)(fid_cq*, void* buffer, std::size_t count, fi_addr_t* from);
    ssize_t (*readerr)(fid_cq*, fi_cq_err_entry*, std::uint64_t flags);
    ssize_t (*sread)(fid_cq*, void* buffer, std::size_t count, const void* condition, int timeout);
    ssize_t (*sreadfrom)(fid_cq*, void* buffer, std::size_t count, fi_addr_t* from,
                         const void* condition, int timeout);
};

struct fid_cq {
    struct fid fid;
    fi_ops_cq* ops;
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
    any_function read, readv, readmsg;
    ssize_t (*write)(fid_ep*, const void* buf, std::size_t len, void* desc, fi_addr_t to,
                     std::uint64_t addr, std::uint64_t key, void* context);
    any_function writev;
    ssize_t (*writemsg)(fid_ep*, const fi_msg_rma*, std::uint64_t flags);
    any_function inject;
    ssize_t (*writedata)(fid_ep*, const void* buf, std::size_t len, void* desc, std::uint64_t data,
                         fi_addr_t to, std::uint64_t addr, std::uint64_t key, void* context);
};

struct fid_ep {
    struct fid fid;
    void *ops, *cm, *msg;
    fi_ops_rma* rma;
    void *tagged, *atomic, *collective;
};

}  // namespace fi
