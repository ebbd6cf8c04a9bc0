// AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101), element
// by element, with float32 master weights and, if wanted, a copy of them in the model's dtype.
//
//   g     = grad * grad_scale
//   exp_avg    = beta1 * exp_avg    + (1 - beta1) * g
//   exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g^2
//   master = master * (1 - lr * weight_decay)
//            - lr / (1 - beta1^step) * exp_avg / (sqrt(exp_avg_sq) / sqrt(1 - beta2^step) + eps)
//   model = round(master)
//
// in float32, all in place. grad_scale (clipping, loss scale) is read from the tensors' device, so
// that the host need not wait for it; null stands for 1. Tensors are dense and of one size, and do
// not overlap.
#pragma once

#include <cstdint>

#include "fastllm/dtype.hpp"

namespace fastllm {

struct AdamW {
    std::int64_t count;
    float lr;
    float beta1;
    float beta2;
    float eps;
    float weight_decay;
    float bias_correction1;       // 1 - beta1^step
    float root_bias_correction2;  // sqrt(1 - beta2^step)
    float* master;
    float* exp_avg;
    float* exp_avg_sq;
    DType grad_dtype;
    const void* grad;
    const float* grad_scale;  // one element, or null
    DType model_dtype;
    void* model;  // or null
};

namespace cpu {

// Runs on OpenMP threads and returns when done.
void adamw(const AdamW& args);

}  // namespace cpu

namespace cuda {

// Enqueues on `stream` (a cudaStream_t) of the current device; throws std::runtime_error when
// refused.
void adamw(const AdamW& args, void* stream);

}  // namespace cuda

}  // namespace fastllm
