// Gated linear units without their products (Shazeer, "GLU Variants Improve Transformer",
// arXiv:2002.05202), forward and backward, element by element.
//
//   y   = round(act(gate) * up)          act(v) = v * s,  s = 1 / (1 + exp(-z(v)))
//   dup = round(dy * act(gate))
//   dgate = round(dy * up * (s + gate * s * (1 - s) * z'(gate)))
//
//   kSilu: z(v) = v                                     SwiGLU
//   kGelu: z(v) = 2 sqrt(2/pi) (v + 0.044715 v^3)       GeGLU; v * s is the tanh form of GELU
//          (Hendrycks and Gimpel, arXiv:1606.08415), since tanh(t) = 2 / (1 + exp(-2t)) - 1
//
// Everything between load and store is float32. Tensors are dense and of one size. y may be gate or
// up; dgate and dup may be any of dy, gate and up, but not each other; nothing else may overlap.
// NaN propagates. Where exp overflows, s is 0 or 1; GELU of a finite value below -30 is 0, above 30
// itself.
#pragma once

#include <cstdint>

#include "fastllm/dtype.hpp"

namespace fastllm {

enum class GluActivation { kSilu, kGelu };

struct GluFwd {
    DType dtype;
    GluActivation activation;
    std::int64_t count;  // elements of each tensor
    const void* gate;
    const void* up;
    void* y;
};

struct GluBwd {
    DType dtype;
    GluActivation activation;
    std::int64_t count;
    const void* dy;
    const void* gate;
    const void* up;
    void* dgate;
    void* dup;
};

namespace cpu {

// Runs on OpenMP threads and returns when done.
void glu_fwd(const GluFwd& args);
void glu_bwd(const GluBwd& args);

}  // namespace cpu

namespace cuda {

// Enqueue on `stream` (a cudaStream_t) of the current device; throw std::runtime_error when
// refused.
void glu_fwd(const GluFwd& args, void* stream);
void glu_bwd(const GluBwd& args, void* stream);

}  // namespace cuda

}  // namespace fastllm
