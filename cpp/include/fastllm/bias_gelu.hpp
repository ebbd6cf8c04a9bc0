// GELU of a sum with a bias, forward and backward: what stands between the two layers of a GPT-2
// feed-forward block.
//
//   v     = x + bias
//   y     = round(v * s),  s = 1 / (1 + exp(-z)),  z = 2 sqrt(2/pi) (v + 0.044715 v^3)
//   d     = dy * (s + v * s * (1 - s) * dz/dv)
//   dx    = round(d)
//   dbias = round(sum_r(d))
//
// the tanh form of GELU (Hendrycks and Gimpel, arXiv:1606.08415), since tanh(t) = 2 / (1 +
// exp(-2t)) - 1. Everything between load and store is float32. GELU of a finite value below -30 is
// 0, above 30 itself. NaN propagates, in dbias within its column.
//
// Tensors are dense and row-major. y may be x; dx may be dy or x; nothing else may overlap. rows
// may be 0 (dbias is then zero). dbias is a two-stage sum in a fixed order, as in rmsnorm.hpp.
#pragma once

#include <cstdint>

#include "fastllm/dtype.hpp"

namespace fastllm {

struct BiasGeluFwd {
    DType dtype;
    std::int64_t rows;
    std::int64_t cols;  // at least 1
    const void* x;      // [rows, cols]
    const void* bias;   // [cols]
    void* y;            // [rows, cols]
};

struct BiasGeluBwd {
    DType dtype;
    std::int64_t rows;
    std::int64_t cols;
    const void* dy;      // [rows, cols]
    const void* x;       // [rows, cols]
    const void* bias;    // [cols]
    void* dx;            // [rows, cols]
    void* dbias;         // [cols]
    float* partial;      // [parts, cols] scratch, overwritten; its layout is private
    std::int64_t parts;  // what bias_gelu_bwd_parts(rows, cols) of the same namespace returns
};

namespace cpu {

// Runs on OpenMP threads and returns when done. Results do not depend on the number of threads.
void bias_gelu_fwd(const BiasGeluFwd& args);
void bias_gelu_bwd(const BiasGeluBwd& args);
std::int64_t bias_gelu_bwd_parts(std::int64_t rows, std::int64_t cols);

}  // namespace cpu

namespace cuda {

// Enqueue on `stream` (a cudaStream_t) of the current device; throw std::runtime_error when
// refused.
void bias_gelu_fwd(const BiasGeluFwd& args, void* stream);
void bias_gelu_bwd(const BiasGeluBwd& args, void* stream);
std::int64_t bias_gelu_bwd_parts(std::int64_t rows, std::int64_t cols);

}  // namespace cuda

}  // namespace fastllm
