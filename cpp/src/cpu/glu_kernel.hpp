// The per-level entry points of glu_kernel.cpp.
#pragma once

#include <cstdint>

#include "fastllm/glu.hpp"

namespace fastllm::cpu {

struct GluKernels {
    // Elements [begin, end). `stream`: the outputs are too large to be found in the cache.
    void (*fwd)(const GluFwd& args, std::int64_t begin, std::int64_t end, bool stream);
    void (*bwd)(const GluBwd& args, std::int64_t begin, std::int64_t end, bool stream);
};

namespace portable {
extern const GluKernels glu;
}
namespace avx2 {
extern const GluKernels glu;
}
namespace avx512 {
extern const GluKernels glu;
}

}  // namespace fastllm::cpu
