// The per-level entry points of cross_entropy_kernel.cpp.
#pragma once

#include <cstdint>

#include "fastllm/cross_entropy.hpp"

namespace fastllm::cpu {

struct CrossEntropyKernels {
    // Rows [begin, end). `stream`: the output is too large to be found in the cache.
    void (*fwd)(const CrossEntropyFwd& args, std::int64_t begin, std::int64_t end);
    void (*loss)(const CrossEntropyLoss& args, std::int64_t begin, std::int64_t end);
    void (*bwd)(const CrossEntropyBwd& args, std::int64_t begin, std::int64_t end, bool stream);
};

namespace portable {
extern const CrossEntropyKernels cross_entropy;
}
namespace avx2 {
extern const CrossEntropyKernels cross_entropy;
}
namespace avx512 {
extern const CrossEntropyKernels cross_entropy;
}

}  // namespace fastllm::cpu
