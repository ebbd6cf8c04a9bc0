// The per-level entry points of grad_norm_kernel.cpp.
#pragma once

#include <cstdint>

#include "fastllm/grad_norm.hpp"

namespace fastllm::cpu {

struct GradNormKernels {
    // Elements [begin, end).
    float (*squared_sum)(const SquaredSum& args, std::int64_t begin, std::int64_t end);
};

namespace portable {
extern const GradNormKernels grad_norm;
}
namespace avx2 {
extern const GradNormKernels grad_norm;
}
namespace avx512 {
extern const GradNormKernels grad_norm;
}

}  // namespace fastllm::cpu
