// libfabric, loaded at run time: the four calls that are symbols. All others go through the tables
// inside the objects (objects.hpp).
#pragma once

#include <cstdint>
#include <memory>
#include <source_location>
#include <string>
#include <string_view>
#include <vector>

#include <weightsync/error.hpp>

#include "abi.hpp"

namespace weightsync::ofi {

struct Library {
    int (*getinfo)(std::uint32_t version, const char* node, const char* service,
                   std::uint64_t flags, const abi::fi_info* hints, abi::fi_info** info) = nullptr;
    void (*freeinfo)(abi::fi_info* info) = nullptr;
    abi::fi_info* (*dupinfo)(const abi::fi_info* info) = nullptr;
    int (*fabric)(abi::fi_fabric_attr* attr, abi::fid_fabric** fabric, void* context) = nullptr;
    const char* (*strerror)(int error) = nullptr;
    std::uint32_t (*version)() = nullptr;
};

// Loads it once per process and keeps it. Throws kConfig naming the package when it is not there or
// older than 1.17.
[[nodiscard]] const Library& library();

// A call that failed with -`error`; .call and .errno as in os_error().
[[nodiscard]] Error call_error(Scope scope, std::string_view call, long error,
                               std::string_view advice,
                               std::source_location where = std::source_location::current());

using Info = std::shared_ptr<abi::fi_info>;

// What to ask a provider for.
struct InfoRequest {
    std::string provider;  // "tcp", "shm", "verbs;ofi_rxm", "efa"
    std::string address;   // of an interface of this host, or empty
    std::string domain;    // a device, or empty
    std::string endpoint;  // a name of our own for the endpoint; only shm
};
// All that fit, best first: one for each domain and address of the provider. Throws kConfig when
// there is none.
[[nodiscard]] std::vector<Info> find_infos(const InfoRequest& request);

// Some providers install handlers for SIGINT, SIGTERM, SIGSEGV and SIGBUS, which belong to the
// host language: puts back what was there.
class SignalGuard {
  public:
    SignalGuard();
    ~SignalGuard();
    SignalGuard(const SignalGuard&) = delete;
    SignalGuard& operator=(const SignalGuard&) = delete;

  private:
    struct Saved;
    std::unique_ptr<Saved> saved_;
};

}  // namespace weightsync::ofi
