// The fabrics of this build.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include <weightsync/engine.hpp>

namespace weightsync {

struct LocalOptions {
    int num_threads = 0;  // copying threads; 0: two, or one on a one-core machine
};
// Processes of one host, one user and one pid namespace.
[[nodiscard]] std::unique_ptr<Fabric> make_local_fabric(EngineContext& context,
                                                        const LocalOptions& options);

// The same with memory of the host's GPUs on either side or both; loads the CUDA driver. Throws
// kConfig when there is no GPU.
[[nodiscard]] std::unique_ptr<Fabric> make_cuda_ipc_fabric(EngineContext& context,
                                                           const LocalOptions& options);

struct OfiOptions {
    std::string provider;  // of libfabric: "tcp", "shm", "verbs;ofi_rxm", "efa"
    // Of this host: where sources knock, and for providers with IP addresses one rail for each.
    std::vector<std::string> addresses{"127.0.0.1"};
    // Devices, one rail for each; empty: all of them, or those of the addresses.
    std::vector<std::string> domains;
    // Data travels without authentication; off loopback only where everybody is trusted.
    bool is_trusted_network = false;
    // Register sources also for providers that do not ask for it: tests of those that do.
    bool registers_sources = false;
};
// libfabric, loaded now. Throws kConfig when it is missing or offers no such provider.
[[nodiscard]] std::unique_ptr<Fabric> make_ofi_fabric(EngineContext& context,
                                                      const OfiOptions& options);

struct TcpOptions {
    // Numeric IP addresses of this host, one per rail; none: 127.0.0.1.
    std::vector<std::string> addresses;
    int num_streams = 2;  // connections of each path
    // Most bytes that one connection holds. The default suits a round trip of a millisecond at
    // 40 Gbit/s. What a path holds when its rail dies is sent again, and what a slow rail holds at
    // the end is waited for: not more than needed.
    std::uint64_t window_bytes = std::uint64_t{4} << 20;
};
// Hosts without RDMA. Connections are authenticated by a key that travels in the descriptor.
[[nodiscard]] std::unique_ptr<Fabric> make_tcp_fabric(EngineContext& context,
                                                      const TcpOptions& options);

// Two fabrics as one: peers that `near` reaches, which is one of this host's, go over it, all
// others over `far`. A target is open to both, with one board and one fence.
[[nodiscard]] std::unique_ptr<Fabric> make_mixed_fabric(EngineContext& context,
                                                        std::unique_ptr<Fabric> near,
                                                        std::unique_ptr<Fabric> far);

// What goes before a fabric between hosts.
struct NearOptions {
    std::string fabric;   // "local" or "cuda_ipc"; empty: nothing
    int num_threads = 0;  // as LocalOptions'
};
// `far` alone, or behind a fabric of the host. Throws what either throws.
[[nodiscard]] std::unique_ptr<Fabric> make_behind(EngineContext& context, const NearOptions& near,
                                                  std::unique_ptr<Fabric> far);

}  // namespace weightsync
