// The files that the shm provider makes in /dev/shm, one for each endpoint.
#pragma once

#include <string>

namespace weightsync::ofi {

// A name for the endpoints of a domain that tells later whose it was.
[[nodiscard]] std::string make_shm_name();

// Removes what killed processes of this user and pid namespace have left behind.
void sweep_shm_files() noexcept;

}  // namespace weightsync::ofi
