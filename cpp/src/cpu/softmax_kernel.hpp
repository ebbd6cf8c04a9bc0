// The per-level entry points of softmax_kernel.cpp.
#pragma once

#include <cstdint>

#include "fastllm/softmax.hpp"

namespace fastllm::cpu {

struct SoftmaxKernels {
    // Rows [begin, end) of batch * heads * queries. `stream`: the output is too large to be found
    // in the cache by its reader.
    void (*fwd)(const SoftmaxFwd& args, std::int64_t begin, std::int64_t end, bool stream);
    void (*bwd)(const SoftmaxBwd& args, std::int64_t begin, std::int64_t end, bool stream);
};

namespace portable {
extern const SoftmaxKernels softmax;
}
namespace avx2 {
extern const SoftmaxKernels softmax;
}
namespace avx512 {
extern const SoftmaxKernels softmax;
}

}  // namespace fastllm::cpu
