// Choice of a kernel table by vector level, and of cache-bypassing stores by size.
#pragma once

#include <cstdint>

#include "fastllm/cpu_isa.hpp"

namespace fastllm::cpu {

#if defined(FASTLLM_X86_SIMD)
#define FASTLLM_KERNELS(op) ::fastllm::cpu::select(portable::op, avx2::op, avx512::op)
#else
#define FASTLLM_KERNELS(op) (portable::op)
#endif

template <class Kernels>
const Kernels& select(const Kernels& portable, const Kernels& avx2, const Kernels& avx512) {
    switch (current_isa()) {
        case Isa::kAvx512:
            return avx512;
        case Isa::kAvx2:
            return avx2;
        case Isa::kPortable:
            break;
    }
    return portable;
}

// A tensor of this size is evicted before its reader comes to it, so writing it around the cache
// saves reading its lines first. The bound is a typical share of a last-level cache, not the
// cache's size: on servers one core's share is far below what the processor reports as a whole.
inline constexpr std::int64_t kStreamBytes = std::int64_t{16} << 20;

inline bool should_stream(std::int64_t bytes) { return bytes >= kStreamBytes; }

}  // namespace fastllm::cpu
