// Causal softmax attention on a CPU, float32, without the matrix of scores in memory (Dao et al.,
// "FlashAttention", arXiv:2205.14135): blocks of queries against blocks of keys.
//
//   s_ij = scale * q_i . k_j  (j <= i),   lse_i = log sum_j exp(s_ij),   p_ij = exp(s_ij - lse_i)
//   out_i = sum_j p_ij v_j
//
//   dv_j = sum_i p_ij dout_i,   ds_ij = scale * p_ij (dout_i . v_j - dout_i . out_i)
//   dq_i = sum_j ds_ij k_j,     dk_j = sum_i ds_ij q_i
//
// heads / kv_heads query heads share a head of keys and values. Every sum has a fixed order:
// results are the same bits for any number of threads. Outputs overlap nothing.
#pragma once

#include <cstdint>

namespace fastllm {

// (batch, length, heads, dim) with adjacent channels; strides in elements.
struct Heads {
    const float* at;
    std::int64_t batch, token, head;
};

struct AttentionFwd {
    std::int64_t batch, length, heads, kv_heads, dim;  // dim as attention_takes() says
    float scale;
    Heads q, k, v;
    float* out;  // (batch, length, heads, dim), dense
    float* lse;  // (batch, heads, length)
};

struct AttentionBwd {
    std::int64_t batch, length, heads, kv_heads, dim;
    float scale;
    Heads q, k, v, out, dout;
    const float* lse;
    float* dq;  // (batch, length, heads, dim), dense
    float* dk;  // (batch, length, kv_heads, dim), dense
    float* dv;
};

namespace cpu {

inline constexpr std::int64_t kAttentionDim = 256;  // at most

inline bool attention_takes(std::int64_t dim) {
    return dim > 0 && dim <= kAttentionDim && dim % 16 == 0;
}

// Run on OpenMP threads and return when done. The threads divide, forward, pairs of a sequence's
// query blocks; backward, heads of keys.
void attention_fwd(const AttentionFwd& args);
void attention_bwd(const AttentionBwd& args);

}  // namespace cpu

}  // namespace fastllm
