#include "library.hpp"

#include <dlfcn.h>
#include <errno.h>
#include <signal.h>

#include <array>
#include <cstdlib>
#include <cstring>

namespace weightsync::ofi {

using namespace abi;  // NOLINT: names of libfabric

namespace {

// The file that a symbol lies in.
std::string_view home_of(const void* symbol) {
    Dl_info info{};
    return symbol != nullptr && ::dladdr(symbol, &info) != 0 ? info.dli_fname : "";
}

// A preloaded library that wraps a call comes first, as it would for a linked program.
template <class Function>
void resolve(void* handle, Function*& function, const char* name, const char* symbol_version) {
    void* found = ::dlvsym(handle, name, symbol_version);
    if (found == nullptr) {
        throw Error(Scope::kConfig, std::string("libfabric has no ") + name + "@" + symbol_version +
                                        "; version 1.17 or newer is needed");
    }
    void* const first = ::dlsym(RTLD_DEFAULT, name);
    if (first != nullptr && home_of(first) != home_of(found)) {
        found = first;
    }
    std::memcpy(&function, &found, sizeof(found));
}

Library load() {
    const SignalGuard guard;  // a provider's library installs its own while it is loaded
    // Global, so that a preloaded wrapper finds what it wraps. Never closed: providers leave
    // threads and exit handlers behind.
    void* handle = ::dlopen("libfabric.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (handle == nullptr) {
        const char* reason = ::dlerror();
        throw Error(Scope::kConfig,
                    std::string("the ofi fabrics need libfabric 1.17 or newer (Debian: apt-get "
                                "install libfabric1): ") +
                        (reason == nullptr ? "not found" : reason));
    }
    Library table;
    resolve(handle, table.getinfo, "fi_getinfo", "FABRIC_1.3");
    resolve(handle, table.freeinfo, "fi_freeinfo", "FABRIC_1.3");
    resolve(handle, table.dupinfo, "fi_dupinfo", "FABRIC_1.3");
    resolve(handle, table.fabric, "fi_fabric", "FABRIC_1.1");
    resolve(handle, table.strerror, "fi_strerror", "FABRIC_1.0");
    resolve(handle, table.version, "fi_version", "FABRIC_1.0");
    if (const std::uint32_t found = table.version(); found < version(1, 17)) {
        throw Error(Scope::kConfig, "libfabric " + std::to_string(found >> 16) + "." +
                                        std::to_string(found & 0xffff) +
                                        " is too old; version 1.17 or newer is needed");
    }
    return table;
}

// Owned by a fi_info: freed by the library with free().
void set_text(char*& field, const std::string& text) {
    std::free(field);
    field = text.empty() ? nullptr : ::strdup(text.c_str());
}

void fill_hints(fi_info& hints, const InfoRequest& request) {
    hints.caps = FI_MSG | FI_RMA | FI_WRITE | FI_REMOTE_WRITE | FI_TRANSMIT | FI_RECV;
    // Contexts are always fi_context2, so both modes cost nothing.
    hints.mode = FI_CONTEXT | FI_CONTEXT2;
    hints.ep_attr->type = FI_EP_RDM;
    hints.tx_attr->op_flags = FI_DELIVERY_COMPLETE | FI_COMPLETION;
    // What EFA demands; a provider asks for the part that it needs.
    hints.domain_attr->mr_mode =
        FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY | FI_MR_ENDPOINT;
    hints.domain_attr->threading = FI_THREAD_SAFE;
    hints.domain_attr->control_progress = FI_PROGRESS_MANUAL;
    hints.domain_attr->data_progress = FI_PROGRESS_MANUAL;
    hints.domain_attr->resource_mgmt = FI_RM_ENABLED;
    set_text(hints.fabric_attr->prov_name, request.provider);
    set_text(hints.domain_attr->name, request.domain);
    if (!request.endpoint.empty()) {
        // A whole string with its zero, as the provider's own names.
        hints.addr_format = FI_ADDR_STR;
        hints.src_addr = ::strdup(request.endpoint.c_str());
        hints.src_addrlen = request.endpoint.size() + 1;
    }
}

}  // namespace

const Library& library() {
    static const Library table = load();
    return table;
}

Error call_error(Scope scope, std::string_view call, long error, std::string_view advice,
                 std::source_location where) {
    const int number = static_cast<int>(error < 0 ? -error : error);
    const char* text = library().strerror(number);
    return Error(scope,
                 std::string(call) + " failed: " + (text == nullptr ? "unknown error" : text) +
                     " (" + std::to_string(number) + "); " + std::string(advice),
                 {{"call", std::string(call)}, {"errno", std::int64_t{number}}}, where);
}

std::vector<Info> find_infos(const InfoRequest& request) {
    const Library& lib = library();
    const SignalGuard guard;
    const Info hints(lib.dupinfo(nullptr), lib.freeinfo);
    if (!hints) {
        throw Error(Scope::kMemory, "libfabric has no memory for a query");
    }
    fill_hints(*hints, request);
    fi_info* found = nullptr;
    const bool has_address = !request.address.empty();
    const int result = lib.getinfo(version(1, 17), has_address ? request.address.c_str() : nullptr,
                                   nullptr, has_address ? FI_SOURCE : 0, hints.get(), &found);
    if (result != 0 || found == nullptr) {
        const std::string what = "fi_getinfo(provider " + request.provider +
                                 (has_address ? ", address " + request.address : "") +
                                 (request.domain.empty() ? "" : ", domain " + request.domain) + ")";
        throw call_error(Scope::kConfig, what, result == 0 ? FI_ENODATA : result,
                         "`fi_info -p " + request.provider +
                             "` shows what this host offers; needed are reliable datagrams (RDM) "
                             "with RMA, remote CQ data and delivery-complete");
    }
    std::vector<Info> infos;
    for (fi_info* next = found; next != nullptr;) {
        fi_info* const info = next;
        next = info->next;
        info->next = nullptr;
        Info owned(info, lib.freeinfo);
        // An immediate has 31 bits.
        if (info->domain_attr->cq_data_size >= 4) {
            infos.push_back(std::move(owned));
        }
    }
    if (infos.empty()) {
        throw Error(Scope::kConfig,
                    "provider " + request.provider + " carries no 4 bytes of remote CQ data");
    }
    return infos;
}

struct SignalGuard::Saved {
    static constexpr std::array<int, 4> kSignals{SIGINT, SIGTERM, SIGSEGV, SIGBUS};
    std::array<struct sigaction, kSignals.size()> actions{};
};

SignalGuard::SignalGuard() : saved_(std::make_unique<Saved>()) {
    for (std::size_t i = 0; i < Saved::kSignals.size(); ++i) {
        ::sigaction(Saved::kSignals[i], nullptr, &saved_->actions[i]);
    }
}

SignalGuard::~SignalGuard() {
    for (std::size_t i = 0; i < Saved::kSignals.size(); ++i) {
        ::sigaction(Saved::kSignals[i], &saved_->actions[i], nullptr);
    }
}

}  // namespace weightsync::ofi
