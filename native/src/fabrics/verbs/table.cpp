#include "table.hpp"

#include <dlfcn.h>

#include <weightsync/error.hpp>

namespace weightsync::verbs {

namespace {

constexpr const char* kLibrary = "libibverbs.so.1";

// The symbol of a certain version, else the default one; null when there is none.
template <class Function>
void look_up(void* library, const char* name, const char* version, Function*& function) {
    void* symbol = ::dlvsym(library, name, version);
    if (symbol == nullptr) {
        symbol = ::dlsym(library, name);
    }
    function = reinterpret_cast<Function*>(symbol);
}

// Empty, or why the table cannot be filled.
std::string fill(Table& table) {
    // Never closed: its providers keep threads and handlers of their own.
    void* library = ::dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        const char* reason = ::dlerror();
        return std::string("cannot load ") + kLibrary + " (" +
               (reason == nullptr ? "no reason given" : reason) +
               "); apt-get install libibverbs1 ibverbs-providers, or rdma-core";
    }
    std::string missing;
    const auto need = [&](const char* name, auto*& function) {
        look_up(library, name, "IBVERBS_1.1", function);
        if (function == nullptr) {
            missing += (missing.empty() ? "" : ", ") + std::string(name);
        }
    };
    need("ibv_get_device_list", table.get_device_list);
    need("ibv_free_device_list", table.free_device_list);
    need("ibv_get_device_name", table.get_device_name);
    need("ibv_open_device", table.open_device);
    need("ibv_close_device", table.close_device);
    need("ibv_get_async_event", table.get_async_event);
    need("ibv_ack_async_event", table.ack_async_event);
    need("ibv_query_device", table.query_device);
    need("ibv_query_port", table.query_port);
    need("ibv_query_gid", table.query_gid);
    need("ibv_query_pkey", table.query_pkey);
    need("ibv_alloc_pd", table.alloc_pd);
    need("ibv_dealloc_pd", table.dealloc_pd);
    need("ibv_reg_mr", table.reg_mr);
    need("ibv_dereg_mr", table.dereg_mr);
    need("ibv_create_comp_channel", table.create_comp_channel);
    need("ibv_destroy_comp_channel", table.destroy_comp_channel);
    need("ibv_create_cq", table.create_cq);
    need("ibv_destroy_cq", table.destroy_cq);
    need("ibv_get_cq_event", table.get_cq_event);
    need("ibv_ack_cq_events", table.ack_cq_events);
    need("ibv_create_qp", table.create_qp);
    need("ibv_modify_qp", table.modify_qp);
    need("ibv_destroy_qp", table.destroy_qp);
    need("ibv_wc_status_str", table.wc_status_str);
    look_up(library, "ibv_reg_mr_iova2", "IBVERBS_1.8", table.reg_mr_iova2);
    look_up(library, "ibv_reg_dmabuf_mr", "IBVERBS_1.12", table.reg_dmabuf_mr);
    if (!missing.empty()) {
        return std::string(kLibrary) + " lacks " + missing + "; install rdma-core 17 or newer";
    }
    return {};
}

struct Loaded {
    Table table;
    std::string problem;
};

const Loaded& loaded() {
    static const Loaded once = [] {
        Loaded made;
        made.problem = fill(made.table);
        return made;
    }();
    return once;
}

}  // namespace

const Table& system_table() {
    const Loaded& made = loaded();
    if (!made.problem.empty()) {
        throw Error(Scope::kConfig, "fabric verbs: " + made.problem);
    }
    return made.table;
}

std::string why_unavailable() {
    return loaded().problem;
}

}  // namespace weightsync::verbs
