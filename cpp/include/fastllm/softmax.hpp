// Softmax of attention scores, forward and backward.
//
//   v = x * scale + slope_head * (j - i - (cols - queries))     with ALiBi (Press et al., "Train
//   Short,
//                                                                 Test Long", arXiv:2108.12409)
//   y = round(exp(v - max) / sum_j(exp(v - max)))                 over the places j that take part,
//   else 0 dx = round(scale * y * (dy - sum_j(dy * y)))
//
// Row i of [batch, heads, queries, cols] takes part at j when
//   causal: j <= i + (cols - queries), so that the last query sees every key;
//   mask:   mask[batch, head, i, j] is not 0. Its strides may be 0, which broadcasts it.
// A row without a place, or whose scores there are all -inf, is 0, and has gradient 0. NaN at a
// place that takes part makes its row NaN. Causal rows are neither read nor computed beyond their
// last place, forward or backward, but filled with 0.
//
// Everything between load and store is float32. Any number of columns works. x, y, dy and dx are
// dense; y may be x, dx may be dy; nothing else may overlap. slopes get no gradient.
#pragma once

#include <cstdint>

#include "fastllm/dtype.hpp"

namespace fastllm {

struct SoftmaxFwd {
    DType dtype;  // of x and y
    std::int64_t batch;
    std::int64_t heads;
    std::int64_t queries;
    std::int64_t cols;  // keys; at least 1
    float scale;
    bool causal;
    const void* x;             // [batch, heads, queries, cols]
    const std::uint8_t* mask;  // with the strides below, adjacent columns; or null
    std::int64_t mask_batch_stride;
    std::int64_t mask_head_stride;
    std::int64_t mask_query_stride;
    const float* slopes;  // [heads], or null
    void* y;              // as x
};

struct SoftmaxBwd {
    DType dtype;
    std::int64_t rows;     // batch * heads * queries
    std::int64_t queries;  // row r is query r % queries
    std::int64_t cols;
    float scale;
    bool causal;
    const void* dy;  // [rows, cols]
    const void* y;   // [rows, cols]
    void* dx;        // [rows, cols]
};

namespace cpu {

// Runs on OpenMP threads and returns when done. Results do not depend on the number of threads.
void softmax_fwd(const SoftmaxFwd& args);
void softmax_bwd(const SoftmaxBwd& args);

}  // namespace cpu

namespace cuda {

// Enqueue on `stream` (a cudaStream_t) of the current device; throw std::runtime_error when
// refused.
void softmax_fwd(const SoftmaxFwd& args, void* stream);
void softmax_bwd(const SoftmaxBwd& args, void* stream);

}  // namespace cuda

}  // namespace fastllm
