// The per-level entry points of layernorm_kernel.cpp.
#pragma once

#include <cstdint>

#include "fastllm/layernorm.hpp"

namespace fastllm::cpu {

struct LayerNormKernels {
    // Rows [begin, end). `stream`: the output is too large to be found in the cache by its reader.
    void (*fwd)(const LayerNormFwd& args, std::int64_t begin, std::int64_t end, bool stream);
    // The rows of one part: dx, and the part's sums for dweight and dbias.
    void (*bwd_part)(const LayerNormBwd& args, std::int64_t part, bool stream);
    // Columns [begin, end) of dweight and dbias, from all parts.
    void (*bwd_reduce)(const LayerNormBwd& args, std::int64_t begin, std::int64_t end);
};

namespace portable {
extern const LayerNormKernels layernorm;
}
namespace avx2 {
extern const LayerNormKernels layernorm;
}
namespace avx512 {
extern const LayerNormKernels layernorm;
}

}  // namespace fastllm::cpu
