// Fabrics between the processes of one host, which differ in the memory that they pull.
#pragma once

#include <memory>
#include <string>

#include <weightsync/fabrics.hpp>

#include "pull_memory.hpp"

namespace weightsync::local {

[[nodiscard]] std::unique_ptr<Fabric> make_fabric(EngineContext& context, std::string name,
                                                  const LocalOptions& options,
                                                  std::unique_ptr<PullMemory> memory);

}  // namespace weightsync::local
