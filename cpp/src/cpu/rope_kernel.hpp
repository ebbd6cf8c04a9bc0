// The per-level entry points of rope_kernel.cpp.
#pragma once

#include <cstdint>

#include "fastllm/rope.hpp"

namespace fastllm::cpu {

struct RopeKernels {
    // Tokens [begin, end) of batch * tokens.
    void (*run)(const Rope& args, std::int64_t begin, std::int64_t end);
};

namespace portable {
extern const RopeKernels rope;
}
namespace avx2 {
extern const RopeKernels rope;
}
namespace avx512 {
extern const RopeKernels rope;
}

}  // namespace fastllm::cpu
