// Matrix products with fused epilogues on tensor cores: CUTLASS 2.x for sm_80 and later, and,
// where the device is an sm_90, warp-specialised kernels of CUTLASS 3.x.
//
// Matrices are dense and row-major, of `dtype` (bfloat16 or float16), with float32 accumulation; a
// weight is (out, in), as torch.nn.Linear keeps it. `n` and `k` are multiples of 8 and every
// pointer is aligned to 16 bytes; `m` is any. Outputs overlap nothing. Launched on `stream` (a
// cudaStream_t); nothing waits for it. Throws std::invalid_argument for a shape, dtype or alignment
// that these kernels do not take, and std::runtime_error when the launch fails.
//
// There is no CPU version: on a CPU the same products are torch's.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fastllm/dtype.hpp"

namespace fastllm {

// y = x w^T + bias. x (m, k), w (n, k), bias (n) or null, y (m, n).
struct LinearBias {
    DType dtype;
    std::int64_t m, n, k;
    const void* x;
    const void* w;
    const void* bias;
    void* y;
};

// pre = x w^T + bias; y = gelu(pre), by the tanh approximation (Hendrycks and Gimpel 2016). As
// LinearBias, bias not null; pre (m, n), which backward needs.
struct LinearBiasGelu {
    DType dtype;
    std::int64_t m, n, k;
    const void* x;
    const void* w;
    const void* bias;
    void* y;
    void* pre;
};

// gate = x wg^T, up = x wu^T, y = silu(gate) * up. wg and wu (n, k); gate, up, y (m, n). y is
// computed from gate and up as they are stored. Both products in one kernel, x read once; on an
// sm_90 in two: that of up reads gate again, and y comes of its epilogue.
struct LinearSwiglu {
    DType dtype;
    std::int64_t m, n, k;
    const void* x;
    const void* wg;
    const void* wu;
    void* gate;
    void* up;
    void* y;
};

// dw += dy^T x, in float32: dy (m, n), x (m, k), dw (n, k).
struct LinearWeightGrad {
    DType dtype;
    std::int64_t m, n, k;
    const void* dy;
    const void* x;
    float* dw;
};

// For each group g: y[offsets[g]:offsets[g+1]] = x[offsets[g]:offsets[g+1]] w[g]^T. x (m, k),
// w (groups, n, k), y (m, n); offsets (groups + 1) int64 in device memory, ascending from 0 to m,
// so that the host need not know how tokens fell to experts. `workspace`: grouped_workspace_bytes()
// bytes of device memory, aligned to 16, of the device that is current then and at the launch.
struct GroupedLinear {
    DType dtype;
    std::int64_t m, n, k;
    std::int64_t groups;
    const void* x;
    const void* w;
    const std::int64_t* offsets;
    void* y;
    void* workspace;
};

namespace cuda {

void linear_bias(const LinearBias& args, void* stream);
void linear_bias_gelu(const LinearBiasGelu& args, void* stream);
void linear_swiglu(const LinearSwiglu& args, void* stream);
void linear_weight_grad(const LinearWeightGrad& args, void* stream);
void grouped_linear(const GroupedLinear& args, void* stream);
std::size_t grouped_workspace_bytes(std::int64_t groups);

}  // namespace cuda
}  // namespace fastllm
