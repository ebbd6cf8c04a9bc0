// The per-level entry points of bias_gelu_kernel.cpp.
#pragma once

#include <cstdint>

#include "fastllm/bias_gelu.hpp"

namespace fastllm::cpu {

struct BiasGeluKernels {
    // Rows [begin, end). `stream`: the output is too large to be found in the cache by its reader.
    void (*fwd)(const BiasGeluFwd& args, std::int64_t begin, std::int64_t end, bool stream);
    // The rows of one part: dx, and partial[part].
    void (*bwd_part)(const BiasGeluBwd& args, std::int64_t part, bool stream);
    // Columns [begin, end) of dbias, from all parts.
    void (*bwd_reduce)(const BiasGeluBwd& args, std::int64_t begin, std::int64_t end);
};

namespace portable {
extern const BiasGeluKernels bias_gelu;
}
namespace avx2 {
extern const BiasGeluKernels bias_gelu;
}
namespace avx512 {
extern const BiasGeluKernels bias_gelu;
}

}  // namespace fastllm::cpu
