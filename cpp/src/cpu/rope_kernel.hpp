// The per-level entry points of rope_kernel.cpp.
#pragma once

#include <cstdint>

#include "fastllm/rope.hpp"

namespace fastllm::cpu {

struct RopeKernels {
    // Tokens [begin, end) of batch * tokens. `stream`: the output is too large to be found in the
    // cache by its reader.
    void (*run)(const Rope& args, std::int64_t begin, std::int64_t end, bool stream);
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
