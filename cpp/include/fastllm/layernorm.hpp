// LayerNorm (Ba, Kiros and Hinton, "Layer Normalization", arXiv:1607.06450), forward and backward,
// with an optional residual addition in front.
//
//   h    = x                        without a residual
//   h    = round(x + residual)      with one; round() is to the tensors' dtype
//   mean = mean_c(h),  rstd = 1 / sqrt(mean_c((h - mean)^2) + eps)
//   n    = (h - mean) * rstd
//   y    = round(n * weight + bias)
//
//   g       = dy * weight
//   dx      = round(rstd * (g - mean_c(g) - n * mean_c(g * n)) + dh)
//   dweight = round(sum_r(dy * n)),  dbias = round(sum_r(dy))
//
// Everything between load and store is float32; the variance is taken from the mean in a second
// pass over the row. With a residual, dx is the gradient of x and of residual alike, and dh is the
// gradient that reaches residual_out from elsewhere.
//
// Tensors are dense and row-major. No output may overlap an input or another output, except that
// residual_out may be x or residual itself. rows may be 0 (dweight and dbias are then zero); cols
// is at least 1. Offsets are 64-bit. A NaN in a row makes that row of y and dx NaN, and no other.
//
// dweight and dbias are two-stage sums in a fixed order, as in rmsnorm.hpp.
#pragma once

#include <cstdint>

#include "fastllm/dtype.hpp"

namespace fastllm {

struct LayerNormFwd {
    DType dtype;  // of x, residual, weight, bias, y and residual_out
    std::int64_t rows;
    std::int64_t cols;
    float eps;
    const void* x;         // [rows, cols]
    const void* residual;  // [rows, cols], or null
    const void* weight;    // [cols]
    const void* bias;      // [cols], or null for zero
    void* y;               // [rows, cols]
    void* residual_out;    // [rows, cols], receives h; null exactly when residual is null
    float* mean;           // [rows]
    float* rstd;           // [rows]
};

struct LayerNormBwd {
    DType dtype;  // of dy, h, weight, dh, dx, dweight and dbias
    std::int64_t rows;
    std::int64_t cols;
    const void* dy;      // [rows, cols]
    const void* h;       // [rows, cols]: x, or residual_out
    const void* weight;  // [cols]
    const float* mean;   // [rows]
    const float* rstd;   // [rows]
    const void* dh;      // [rows, cols], or null
    void* dx;            // [rows, cols]
    void* dweight;       // [cols]
    void* dbias;         // [cols], or null where it is not wanted
    float* partial;      // [2, parts, cols] scratch, overwritten; its layout is private
    std::int64_t parts;  // what layernorm_bwd_parts(rows, cols) of the same namespace returns
};

namespace cpu {

// Runs on OpenMP threads and returns when done. Results do not depend on the number of threads.
void layernorm_fwd(const LayerNormFwd& args);
void layernorm_bwd(const LayerNormBwd& args);
std::int64_t layernorm_bwd_parts(std::int64_t rows, std::int64_t cols);

}  // namespace cpu

namespace cuda {

// Enqueue on `stream` (a cudaStream_t) of the current device and return; throw std::runtime_error
// when the launch is refused. Where all pointers are 16-byte aligned and cols is a multiple of 16
// bytes, accesses are 16 bytes wide.
void layernorm_fwd(const LayerNormFwd& args, void* stream);
void layernorm_bwd(const LayerNormBwd& args, void* stream);
std::int64_t layernorm_bwd_parts(std::int64_t rows, std::int64_t cols);

}  // namespace cuda

}  // namespace fastllm
