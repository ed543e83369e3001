// The fabrics of this build.
#pragma once

#include <memory>

#include <weightsync/engine.hpp>

namespace weightsync {

struct LocalOptions {
    int num_threads = 0;  // copying threads; 0: two, or one on a one-core machine
};
// Processes of one host, one user and one pid namespace.
[[nodiscard]] std::unique_ptr<Fabric> make_local_fabric(EngineContext& context,
                                                        const LocalOptions& options);

}  // namespace weightsync
