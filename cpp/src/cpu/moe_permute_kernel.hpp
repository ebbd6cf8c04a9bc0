// The per-level entry points of moe_permute_kernel.cpp.
#pragma once

#include <cstdint>

#include "fastllm/moe_permute.hpp"

namespace fastllm::cpu {

struct MoePermuteKernels {
    // Tokens [begin, end).
    void (*permute)(const MoePermute& args, std::int64_t begin, std::int64_t end);
    // `stream`: the output is too large to be found in the cache by its reader.
    void (*combine)(const MoeCombine& args, std::int64_t begin, std::int64_t end, bool stream);
    void (*combine_bwd)(const MoeCombineBwd& args, std::int64_t begin, std::int64_t end);
};

namespace portable {
extern const MoePermuteKernels moe_permute;
}
namespace avx2 {
extern const MoePermuteKernels moe_permute;
}
namespace avx512 {
extern const MoePermuteKernels moe_permute;
}

}  // namespace fastllm::cpu
