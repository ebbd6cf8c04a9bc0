// The per-level entry points of rmsnorm_kernel.cpp.
#pragma once

#include <cstdint>

#include "fastllm/rmsnorm.hpp"

namespace fastllm::cpu {

struct RmsNormKernels {
    // Rows [begin, end). `stream`: the output is too large to be found in the cache by its reader.
    void (*fwd)(const RmsNormFwd& args, std::int64_t begin, std::int64_t end, bool stream);
    // The rows of one part: dx, and partial[part].
    void (*bwd_part)(const RmsNormBwd& args, std::int64_t part, bool stream);
    // Columns [begin, end) of dweight, from all parts.
    void (*bwd_reduce)(const RmsNormBwd& args, std::int64_t begin, std::int64_t end);
};

namespace portable {
extern const RmsNormKernels rmsnorm;
}
namespace avx2 {
extern const RmsNormKernels rmsnorm;
}
namespace avx512 {
extern const RmsNormKernels rmsnorm;
}

}  // namespace fastllm::cpu
