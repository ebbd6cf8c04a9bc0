// Kernels that move rows between tokens and experts; the formulas are in fastllm/moe_permute.hpp. A
// token belongs to one warp, or to the whole block.
#pragma once

#include "device.cuh"

namespace fastllm::cuda {

inline constexpr int kMoePacks = 2;  // accesses per thread and row before a row gets more threads
inline constexpr int kMoeThreads = 256;

__device__ __forceinline__ std::int64_t token_of_thread() {
    return static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
}

__device__ __forceinline__ bool taken(std::int64_t slot, std::int64_t places) {
    return slot >= 0 && slot < places;
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kMoeThreads)
    moe_permute_kernel(const std::int64_t* __restrict__ slots, const T* __restrict__ x,
                       T* __restrict__ y, std::int64_t tokens, int choices, std::int64_t places,
                       int cols) {
    const std::int64_t token = token_of_thread();
    if (token >= tokens) return;
    for (int c = threadIdx.x * kWidth; c < cols; c += blockDim.x * kWidth) {
        const Pack<T, kWidth> pack = load_pack<kWidth>(x + token * cols + c);
        for (int k = 0; k < choices; ++k) {
            const std::int64_t slot = slots[token * choices + k];
            if (taken(slot, places)) store_pack<kWidth>(y + slot * cols + c, pack);
        }
    }
}

// weights may be null.
template <class T, int kWidth>
__global__ void __launch_bounds__(kMoeThreads)
    moe_combine_kernel(const std::int64_t* __restrict__ slots, const float* __restrict__ weights,
                       const T* __restrict__ y, T* __restrict__ out, std::int64_t tokens,
                       int choices, std::int64_t places, int cols) {
    const std::int64_t token = token_of_thread();
    if (token >= tokens) return;
    for (int c = threadIdx.x * kWidth; c < cols; c += blockDim.x * kWidth) {
        float sums[kWidth] = {};
        for (int k = 0; k < choices; ++k) {
            const std::int64_t slot = slots[token * choices + k];
            if (!taken(slot, places)) continue;
            const float w = weights != nullptr ? weights[token * choices + k] : 1.0f;
            const Pack<T, kWidth> pack = load_pack<kWidth>(y + slot * cols + c);
#pragma unroll
            for (int j = 0; j < kWidth; ++j) sums[j] += w * to_float(pack.lane[j]);
        }
        Pack<T, kWidth> pack;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) pack.lane[j] = from_float<T>(sums[j]);
        store_pack<kWidth>(out + token * cols + c, pack);
    }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kMoeThreads)
    moe_combine_bwd_kernel(const std::int64_t* __restrict__ slots,
                           const float* __restrict__ weights, const T* __restrict__ dout,
                           const T* __restrict__ y, T* __restrict__ dy,
                           float* __restrict__ dweights, std::int64_t tokens, int choices,
                           std::int64_t places, int cols) {
    // Two sets in turn, so that one barrier per choice suffices.
    FASTLLM_SHARED(WarpSums, even_sums);
    FASTLLM_SHARED(WarpSums, odd_sums);
    const std::int64_t token = token_of_thread();
    if (token >= tokens) return;  // a whole warp: with several tokens per block, no barrier follows
    for (int k = 0; k < choices; ++k) {
        const std::int64_t i = token * choices + k;
        const std::int64_t slot = slots[i];
        const bool here = taken(slot, places);
        float dot = 0.0f;
        if (here) {
            const float w = weights[i];
            for (int c = threadIdx.x * kWidth; c < cols; c += blockDim.x * kWidth) {
                Pack<T, kWidth> d = load_pack<kWidth>(dout + token * cols + c);
                const Pack<T, kWidth> v = load_pack<kWidth>(y + slot * cols + c);
#pragma unroll
                for (int j = 0; j < kWidth; ++j) {
                    const float of_dout = to_float(d.lane[j]);
                    dot += of_dout * to_float(v.lane[j]);
                    d.lane[j] = from_float<T>(w * of_dout);
                }
                store_pack<kWidth>(dy + slot * cols + c, d);
            }
        }
        dot = row_sum(dot, k % 2 == 0 ? even_sums : odd_sums);
        if (threadIdx.x == 0) dweights[i] = here ? dot : 0.0f;
    }
}

}  // namespace fastllm::cuda
