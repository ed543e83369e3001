#include "isa.hpp"

namespace weightsync::kernels {

namespace {

Isa detect_isa() noexcept {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("f16c") != 0;
    const bool has_avx512 = __builtin_cpu_supports("avx512f") != 0 &&
                            __builtin_cpu_supports("avx512bw") != 0 &&
                            __builtin_cpu_supports("avx512vl") != 0;
    if (has_avx2 && has_avx512) {
        return Isa::kAvx512;
    }
    if (has_avx2) {
        return Isa::kAvx2;
    }
#endif
    return Isa::kPortable;
}

}  // namespace

Isa best_isa() noexcept {
    static const Isa isa = detect_isa();
    return isa;
}

std::vector<Isa> available_isas() {
    std::vector<Isa> found;
    for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
        if (isa <= best_isa()) {
            found.push_back(isa);
        }
    }
    return found;
}

std::string_view isa_name(Isa isa) noexcept {
    switch (isa) {
        case Isa::kPortable:
            return "portable";
        case Isa::kAvx2:
            return "avx2";
        case Isa::kAvx512:
            return "avx512bw";
    }
    return "";
}

std::optional<Isa> find_isa(std::string_view name) {
    if (name == "auto") {
        return best_isa();
    }
    for (const Isa isa : available_isas()) {
        if (isa_name(isa) == name) {
            return isa;
        }
    }
    return std::nullopt;
}

}  // namespace weightsync::kernels
