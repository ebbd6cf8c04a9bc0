#include <atomic>
#include <stdexcept>
#include <string>

#include "fastllm/cpu_isa.hpp"

namespace fastllm::cpu {
namespace {

Isa best_isa() {
    for (Isa isa : {Isa::kAvx512, Isa::kAvx2}) {
        if (supported(isa)) return isa;
    }
    return Isa::kPortable;
}

std::atomic<Isa>& selected() {
    static std::atomic<Isa> isa{best_isa()};
    return isa;
}

}  // namespace

const char* name_of(Isa isa) {
    return isa == Isa::kAvx512 ? "avx512" : isa == Isa::kAvx2 ? "avx2" : "portable";
}

bool supported(Isa isa) {
    if (isa == Isa::kPortable) return true;
#if defined(FASTLLM_X86_SIMD)
    if (isa == Isa::kAvx2) {
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
    }
    return supported(Isa::kAvx2) && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

Isa current_isa() { return selected().load(std::memory_order_relaxed); }

void set_isa(Isa isa) {
    if (!supported(isa)) {
        throw std::invalid_argument(std::string("this processor does not support ") + name_of(isa));
    }
    selected().store(isa, std::memory_order_relaxed);
}

}  // namespace fastllm::cpu
