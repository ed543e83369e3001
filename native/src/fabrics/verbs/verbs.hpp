// How the fabric is opened.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include <weightsync/engine.hpp>

#include "queue_pair.hpp"

namespace weightsync {

struct VerbsOptions {
    std::vector<std::string> devices;    // "mlx5_0" or "mlx5_0:1"; empty: all active ports
    std::vector<std::string> addresses;  // of the control connection; empty: loopback
    verbs::PathOptions path;
    verbs::MemoryOptions memory;
    // For tests.
    const verbs::Table* table = nullptr;
    std::string sysfs = "/sys";
};

// Hosts that RDMA NICs connect. Throws kConfig without libibverbs or a port that is active.
[[nodiscard]] std::unique_ptr<Fabric> make_verbs_fabric(EngineContext& context,
                                                        const VerbsOptions& options);

}  // namespace weightsync
