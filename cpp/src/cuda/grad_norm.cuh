// Sum of squares; the formula is in fastllm/grad_norm.hpp. A part is a block.
#pragma once

#include "device.cuh"

namespace fastllm::cuda {

inline constexpr int kGradNormThreads = 512;
inline constexpr int kGradNormPacks = 16;  // a thread's accesses

template <class T, int kWidth>
__global__ void __launch_bounds__(kGradNormThreads)
    squared_sum_kernel(const T* __restrict__ x, float* __restrict__ partial, std::int64_t count) {
    FASTLLM_SHARED(WarpSums, sums);
    const std::int64_t begin =
        static_cast<std::int64_t>(blockIdx.x) * kGradNormThreads * kGradNormPacks * kWidth;
    float total = 0.0f;
#pragma unroll 4
    for (int i = 0; i < kGradNormPacks; ++i) {
        const std::int64_t at = begin + (i * kGradNormThreads + threadIdx.x) * kWidth;
        if (at + kWidth <= count) {
            const Pack<T, kWidth> pack = load_pack<kWidth>(x + at);
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
                const float v = to_float(pack.lane[j]);
                total += v * v;
            }
        } else {
            for (std::int64_t k = at; k < count; ++k) total += to_float(x[k]) * to_float(x[k]);
        }
    }
    total = row_sum(total, sums);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

}  // namespace fastllm::cuda
