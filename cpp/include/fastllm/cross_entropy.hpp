// Cross entropy of rows of logits with integer labels, forward and backward, for a vocabulary that
// may be divided over devices (Shoeybi et al., "Megatron-LM", arXiv:1909.08053, section 3).
//
// This device holds the logits of tokens [first, first + cols). The forward pass gives per row
//
//   max    = max_c(x)
//   sum    = sum_c(exp(x - max))
//   target = x[label - first] if the label is here, else 0
//
// of which the caller makes, over all devices, lse = log(sum_i(sum_i exp(max_i - m))) + m with m
// the largest max, and loss = lse - sum_i(target_i). The backward pass gives
//
//   dlogits = round((exp(x - lse) - [c == label - first]) * dloss)
//
// in float32. With `merge`, the forward pass joins max, sum and target with what they hold from
// other columns of the same rows. Where all of the vocabulary is here, cross_entropy_loss gives
//
//   lse  = log(sum_c(exp(x)))
//   loss = lse - x[label]; 0 where the label is `ignore`, NaN where it is no token
//
// A row whose label is `ignore` has target 0 and dlogits 0. A row of nothing but -inf
// has max -inf and sum 0. NaN in a row makes its sum NaN.
//
// Tensors are dense and row-major. dlogits may be the logits themselves; nothing else may overlap.
#pragma once

#include <cstdint>

#include "fastllm/dtype.hpp"

namespace fastllm {

struct CrossEntropyFwd {
    DType dtype;  // of logits
    std::int64_t rows;
    std::int64_t cols;  // at least 1
    std::int64_t first;
    std::int64_t ignore;
    const void* logits;          // [rows, cols]
    const std::int64_t* labels;  // [rows]
    float* max;                  // [rows]
    float* sum;                  // [rows]
    float* target;               // [rows]
    bool merge = false;
};

struct CrossEntropyLoss {
    DType dtype;
    std::int64_t rows;
    std::int64_t cols;
    std::int64_t ignore;
    const void* logits;          // [rows, cols]: all tokens
    const std::int64_t* labels;  // [rows]
    float* lse;                  // [rows]
    float* loss;                 // [rows]
};

struct CrossEntropyBwd {
    DType dtype;  // of logits and dlogits
    std::int64_t rows;
    std::int64_t cols;
    std::int64_t first;
    std::int64_t ignore;
    const void* logits;          // [rows, cols]
    const std::int64_t* labels;  // [rows]
    const float* lse;            // [rows]
    const float* dloss;          // [rows]
    void* dlogits;               // [rows, cols]
};

namespace cpu {

// Runs on OpenMP threads and returns when done. Results do not depend on the number of threads.
void cross_entropy_fwd(const CrossEntropyFwd& args);
void cross_entropy_loss(const CrossEntropyLoss& args);
void cross_entropy_bwd(const CrossEntropyBwd& args);

}  // namespace cpu

namespace cuda {

// Enqueue on `stream` (a cudaStream_t) of the current device; throw std::runtime_error when
// refused.
void cross_entropy_fwd(const CrossEntropyFwd& args, void* stream);
void cross_entropy_loss(const CrossEntropyLoss& args, void* stream);
void cross_entropy_bwd(const CrossEntropyBwd& args, void* stream);

}  // namespace cuda

}  // namespace fastllm
