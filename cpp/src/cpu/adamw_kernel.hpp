// The per-level entry points of adamw_kernel.cpp.
#pragma once

#include <cstdint>

#include "fastllm/adamw.hpp"

namespace fastllm::cpu {

struct AdamWKernels {
    // Elements [begin, end).
    void (*run)(const AdamW& args, std::int64_t begin, std::int64_t end);
};

namespace portable {
extern const AdamWKernels adamw;
}
namespace avx2 {
extern const AdamWKernels adamw;
}
namespace avx512 {
extern const AdamWKernels adamw;
}

}  // namespace fastllm::cpu
