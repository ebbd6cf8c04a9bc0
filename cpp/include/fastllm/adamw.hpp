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
// in float32, all in place. Without `master`, the masters are kept in halves, two bytes each: the
// bits of a master are those of the bfloat16 `model` times 2^16, plus the int16 `lower`. `model` is
// then read too, and is the master rounded to nearest, ties away from zero: to even, the two
// halfway cases of an even weight would need 2^16 + 1 values of `lower`. Every master but NaN comes
// out again to the bit; NaN becomes one without payload. grad_scale (clipping, loss scale) is read
// from the tensors' device, so that the host need not wait for it; null stands for 1. Tensors are
// dense and of one size, and do not overlap.
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
    float* master;                // or null: in halves
    std::int16_t* lower;          // lower halves, where master is null
    float* exp_avg;
    float* exp_avg_sq;
    DType grad_dtype;
    const void* grad;
    const float* grad_scale;  // one element, or null
    DType model_dtype;
    void* model;  // or null; bfloat16 where master is null
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
