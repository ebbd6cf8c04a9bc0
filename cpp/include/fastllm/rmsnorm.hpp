// RMSNorm (Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467), forward
// and backward, with an optional residual addition in front.
//
//   h    = x                        without a residual
//   h    = round(x + residual)      with one; round() is to the tensors' dtype
//   rstd = 1 / sqrt(mean_c(h^2) + eps)
//   y    = round(h * rstd * weight)
//
//   g       = dy * weight
//   dx      = round(rstd * (g - h * rstd * mean_c(g * h * rstd)) + dh)
//   dweight = round(sum_r(dy * h * rstd))
//
// Everything between load and store is float32. With a residual, dx is the gradient of x and of
// residual alike, and dh is the gradient that reaches residual_out from elsewhere.
//
// Tensors are dense and row-major. No output may overlap an input or another output, except that
// residual_out may be x or residual itself. rows may be 0 (dweight is then zero); cols is at
// least 1. Offsets are 64-bit. A NaN in a row makes that row of y and dx NaN, and no other.
//
// dweight is a two-stage sum in a fixed order: `parts` partial sums over disjoint sets of rows,
// then a sum over the parts. The same inputs on the same device with the same `parts` give the same
// bits.
#pragma once

#include <cstdint>

#include "fastllm/dtype.hpp"

namespace fastllm {

struct RmsNormFwd {
    DType dtype;  // of x, residual, weight, y and residual_out
    std::int64_t rows;
    std::int64_t cols;
    float eps;
    const void* x;         // [rows, cols]
    const void* residual;  // [rows, cols], or null
    const void* weight;    // [cols]
    void* y;               // [rows, cols]
    void* residual_out;    // [rows, cols], receives h; null exactly when residual is null
    float* rstd;           // [rows]
};

struct RmsNormBwd {
    DType dtype;  // of dy, h, weight, dh, dx and dweight
    std::int64_t rows;
    std::int64_t cols;
    const void* dy;      // [rows, cols]
    const void* h;       // [rows, cols]: x, or residual_out
    const void* weight;  // [cols]
    const float* rstd;   // [rows]
    const void* dh;      // [rows, cols], or null
    void* dx;            // [rows, cols]
    void* dweight;       // [cols]
    float* partial;      // [parts, cols] scratch, overwritten; its layout is private
    std::int64_t parts;  // what rmsnorm_bwd_parts(rows, cols) of the same namespace returns
};

namespace cpu {

// Runs on OpenMP threads and returns when done. Results do not depend on the number of threads.
void rmsnorm_fwd(const RmsNormFwd& args);
void rmsnorm_bwd(const RmsNormBwd& args);
std::int64_t rmsnorm_bwd_parts(std::int64_t rows, std::int64_t cols);

}  // namespace cpu

namespace cuda {

// Enqueue on `stream` (a cudaStream_t) of the current device and return; throw std::runtime_error
// when the launch is refused. Pointers need the alignment of their element type; where all of them
// are 16-byte aligned and cols is a multiple of 16 bytes, accesses are 16 bytes wide.
void rmsnorm_fwd(const RmsNormFwd& args, void* stream);
void rmsnorm_bwd(const RmsNormBwd& args, void* stream);
std::int64_t rmsnorm_bwd_parts(std::int64_t rows, std::int64_t cols);

}  // namespace cuda

}  // namespace fastllm
