// libibverbs as a table of functions: filled by dlopen, or by a test.
#pragma once

#include <string>

#include "abi.hpp"

namespace weightsync::verbs {

struct Table {
    ibv_device** (*get_device_list)(int* num_devices) = nullptr;
    void (*free_device_list)(ibv_device** list) = nullptr;
    const char* (*get_device_name)(ibv_device* device) = nullptr;
    ibv_context* (*open_device)(ibv_device* device) = nullptr;
    int (*close_device)(ibv_context* context) = nullptr;
    int (*get_async_event)(ibv_context* context, ibv_async_event* event) = nullptr;
    void (*ack_async_event)(ibv_async_event* event) = nullptr;
    int (*query_device)(ibv_context* context, ibv_device_attr* attr) = nullptr;
    int (*query_port)(ibv_context* context, std::uint8_t port, ibv_port_attr* attr) = nullptr;
    int (*query_gid)(ibv_context* context, std::uint8_t port, int index, Gid* gid) = nullptr;
    int (*query_pkey)(ibv_context* context, std::uint8_t port, int index,
                      std::uint16_t* pkey) = nullptr;
    ibv_pd* (*alloc_pd)(ibv_context* context) = nullptr;
    int (*dealloc_pd)(ibv_pd* pd) = nullptr;
    ibv_mr* (*reg_mr)(ibv_pd* pd, void* address, std::size_t nbytes, int access) = nullptr;
    int (*dereg_mr)(ibv_mr* mr) = nullptr;
    ibv_comp_channel* (*create_comp_channel)(ibv_context* context) = nullptr;
    int (*destroy_comp_channel)(ibv_comp_channel* channel) = nullptr;
    ibv_cq* (*create_cq)(ibv_context* context, int num_entries, void* cq_context,
                         ibv_comp_channel* channel, int vector) = nullptr;
    int (*destroy_cq)(ibv_cq* cq) = nullptr;
    int (*get_cq_event)(ibv_comp_channel* channel, ibv_cq** cq, void** cq_context) = nullptr;
    void (*ack_cq_events)(ibv_cq* cq, unsigned num_events) = nullptr;
    ibv_qp* (*create_qp)(ibv_pd* pd, ibv_qp_init_attr* attr) = nullptr;
    int (*modify_qp)(ibv_qp* qp, ibv_qp_attr* attr, int mask) = nullptr;
    int (*destroy_qp)(ibv_qp* qp) = nullptr;
    const char* (*wc_status_str)(ibv_wc_status status) = nullptr;

    // Null in old releases; the fabric does without.
    // Takes optional access flags, such as relaxed ordering (rdma-core 28).
    ibv_mr* (*reg_mr_iova2)(ibv_pd* pd, void* address, std::size_t nbytes, std::uint64_t iova,
                            unsigned access) = nullptr;
    // GPU memory without a kernel module of the GPU's driver (rdma-core 34, Linux 5.12).
    ibv_mr* (*reg_dmabuf_mr)(ibv_pd* pd, std::uint64_t offset, std::size_t nbytes,
                             std::uint64_t iova, int fd, int access) = nullptr;
};

// The library of this machine, loaded at the first call and kept. Throws kConfig saying what to
// install.
[[nodiscard]] const Table& system_table();

// Why system_table() would throw, or empty.
[[nodiscard]] std::string why_unavailable();

}  // namespace weightsync::verbs
