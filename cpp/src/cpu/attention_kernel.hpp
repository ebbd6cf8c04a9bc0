// The per-level entry points of attention_kernel.cpp.
#pragma once

#include <cstdint>

#include "fastllm/attention.hpp"

namespace fastllm::cpu {

inline constexpr int kAttentionBlock = 64;  // queries, and keys, at a time

struct AttentionKernels {
    // Block `block` of the queries of one head.
    void (*fwd)(const AttentionFwd& args, std::int64_t batch, std::int64_t head,
                std::int64_t block);
    // All of one head of keys.
    void (*bwd)(const AttentionBwd& args, std::int64_t batch, std::int64_t kv_head);
};

namespace portable {
extern const AttentionKernels attention;
}
namespace avx2 {
extern const AttentionKernels attention;
}
namespace avx512 {
extern const AttentionKernels attention;
}

}  // namespace fastllm::cpu
