// Instruction sets of the kernels, chosen once per process and overridable per call by tests.
#pragma once

#include <optional>
#include <string_view>
#include <vector>

namespace weightsync::kernels {

// Ordered: a later set implies the earlier ones. kAvx2 includes F16C, kAvx512 is F + BW + VL.
enum class Isa { kPortable, kAvx2, kAvx512 };

// The best set of this machine (detected at the first call, then constant).
[[nodiscard]] Isa best_isa() noexcept;

// All sets that this machine can run, worst first.
[[nodiscard]] std::vector<Isa> available_isas();

[[nodiscard]] std::string_view isa_name(Isa isa) noexcept;

// "auto" is best_isa(); nullopt for unknown names and for sets that this machine lacks.
[[nodiscard]] std::optional<Isa> find_isa(std::string_view name);

}  // namespace weightsync::kernels
