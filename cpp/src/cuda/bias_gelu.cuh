// Kernels of GELU behind a bias; the formula is in fastllm/bias_gelu.hpp. A thread takes one pack
// of columns, and every gridDim.y-th row: the bias is read once, and sums over rows need no
// exchange.
#pragma once

#include "column_sums.cuh"
#include "device.cuh"
#include "gelu.cuh"

namespace fastllm::cuda {

inline constexpr int kBiasGeluThreads = 128;

template <class T, int kWidth>
__global__ void __launch_bounds__(kBiasGeluThreads)
    bias_gelu_fwd_kernel(const T* x, const T* __restrict__ bias, T* y, std::int64_t rows,
                         int cols) {
    const int c = (blockIdx.x * kBiasGeluThreads + threadIdx.x) * kWidth;
    if (c >= cols) return;
    const Pack<T, kWidth> b = load_pack<kWidth>(bias + c);
    for (std::int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
        Pack<T, kWidth> pack = load_pack<kWidth>(x + row * cols + c);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
            const float v = to_float(pack.lane[j]) + to_float(b.lane[j]);
            pack.lane[j] = from_float<T>(v * gelu_gate(v).s);
        }
        store_pack<kWidth>(y + row * cols + c, pack);
    }
}

// Part blockIdx.y takes every gridDim.y-th row.
template <class T, int kWidth>
__global__ void __launch_bounds__(kBiasGeluThreads)
    bias_gelu_bwd_kernel(const T* dy, const T* x, const T* __restrict__ bias, T* dx,
                         float* __restrict__ partial, std::int64_t rows, int cols) {
    const int p = blockIdx.x * kBiasGeluThreads + threadIdx.x;
    const int c = p * kWidth;
    if (c >= cols) return;
    const Pack<T, kWidth> b = load_pack<kWidth>(bias + c);
    float sums[kWidth] = {};
    for (std::int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
        const Pack<T, kWidth> in = load_pack<kWidth>(x + row * cols + c);
        Pack<T, kWidth> pack = load_pack<kWidth>(dy + row * cols + c);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
            const float v = to_float(in.lane[j]) + to_float(b.lane[j]);
            const float d = to_float(pack.lane[j]) * derivative(v, gelu_gate(v));
            sums[j] += d;
            pack.lane[j] = from_float<T>(d);
        }
        store_pack<kWidth>(dx + row * cols + c, pack);
    }
    add_to_partial<kWidth>(partial + static_cast<std::int64_t>(blockIdx.y) * cols, sums, true, p,
                           cols / kWidth);
}

}  // namespace fastllm::cuda
