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

struct TcpOptions {
    // Numeric IP addresses of this host, one per rail; none: 127.0.0.1.
    std::vector<std::string> addresses;
    int num_streams = 2;  // connections of each path
};
// Hosts without RDMA. Connections are authenticated by a key that travels in the descriptor.
[[nodiscard]] std::unique_ptr<Fabric> make_tcp_fabric(EngineContext& context,
                                                      const TcpOptions& options);

}  // namespace weightsync
