// Cross entropy kernels; the formula is in fastllm/cross_entropy.hpp. A row belongs to one warp, or
// to the whole block, and is read once by each kernel.
#pragma once

#include "device.cuh"

namespace fastllm::cuda {

inline constexpr int kCrossEntropyThreads = 1024;

// max and sum(exp(x - max)) of some elements.
struct MaxAndSum {
    float max;
    float sum;
};

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

// exp(x - max), and 0 where both are -inf.
__device__ __forceinline__ float exp_below(float x, float max) {
    return x == minus_infinity() ? 0.0f : __expf(x - max);
}

__device__ __forceinline__ MaxAndSum joined(const MaxAndSum& a, const MaxAndSum& b) {
    const float max = a.max > b.max ? a.max : b.max;
    return {max, a.sum * exp_below(a.max, max) + b.sum * exp_below(b.max, max)};
}

__device__ __forceinline__ MaxAndSum warp_joined(MaxAndSum v) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        const MaxAndSum other{__shfl_xor_sync(kAllLanes, v.max, offset),
                              __shfl_xor_sync(kAllLanes, v.sum, offset)};
        v = joined(v, other);
    }
    return v;
}

struct WarpMaxAndSums {
    MaxAndSum of_warp[1024 / kWarp];
};

// As row_sum().
__device__ __forceinline__ MaxAndSum row_joined(MaxAndSum v, WarpMaxAndSums& warps) {
    v = warp_joined(v);
    if (blockDim.x == kWarp) return v;
    const unsigned lane = threadIdx.x % kWarp;
    if (lane == 0) warps.of_warp[threadIdx.x / kWarp] = v;
    __syncthreads();
    const MaxAndSum none{minus_infinity(), 0.0f};
    return warp_joined(lane < blockDim.x / kWarp ? warps.of_warp[lane] : none);
}

// The thread with threadIdx.x == 0 has the row's.
template <int kWidth, class T>
__device__ __forceinline__ MaxAndSum max_and_sum(const T* x, int cols, WarpMaxAndSums& warps) {
    MaxAndSum mine{minus_infinity(), 0.0f};
    for (int p = threadIdx.x; p < cols / kWidth; p += blockDim.x) {
        const Pack<T, kWidth> pack = load_pack<kWidth>(x + p * kWidth);
        MaxAndSum here{to_float(pack.lane[0]), 0.0f};
#pragma unroll
        for (int j = 1; j < kWidth; ++j) {
            const float v = to_float(pack.lane[j]);
            if (v > here.max) here.max = v;
        }
#pragma unroll
        for (int j = 0; j < kWidth; ++j) here.sum += exp_below(to_float(pack.lane[j]), here.max);
        mine = joined(mine, here);
    }
    return row_joined(mine, warps);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kCrossEntropyThreads)
    cross_entropy_fwd_kernel(const T* __restrict__ logits, const std::int64_t* __restrict__ labels,
                             float* __restrict__ max_out, float* __restrict__ sum_out,
                             float* __restrict__ target_out, std::int64_t rows, int cols,
                             std::int64_t first, std::int64_t ignore, bool merge) {
    FASTLLM_SHARED(WarpMaxAndSums, warps);
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= rows) return;  // a whole warp: with several rows per block, no barrier follows
    const T* x = logits + row * cols;
    MaxAndSum all = max_and_sum<kWidth>(x, cols, warps);
    if (threadIdx.x != 0) return;
    if (merge) all = joined({max_out[row], sum_out[row]}, all);
    max_out[row] = all.max;
    sum_out[row] = all.sum;
    const std::int64_t label = labels[row];
    const std::int64_t column = label - first;
    const bool here = label != ignore && column >= 0 && column < cols;
    if (here || !merge) target_out[row] = here ? to_float(x[column]) : 0.0f;
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kCrossEntropyThreads)
    cross_entropy_loss_kernel(const T* __restrict__ logits, const std::int64_t* __restrict__ labels,
                              float* __restrict__ lse_out, float* __restrict__ loss_out,
                              std::int64_t rows, int cols, std::int64_t ignore) {
    FASTLLM_SHARED(WarpMaxAndSums, warps);
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    const T* x = logits + row * cols;
    const MaxAndSum all = max_and_sum<kWidth>(x, cols, warps);
    if (threadIdx.x != 0) return;
    const float lse = all.max + __logf(all.sum);
    const std::int64_t label = labels[row];
    float loss = __uint_as_float(0x7fc00000u);
    if (label >= 0 && label < cols) loss = lse - to_float(x[label]);
    lse_out[row] = lse;
    loss_out[row] = label == ignore ? 0.0f : loss;
}

// dlogits may be logits: every element is read and written by one thread, in this order.
template <class T, int kWidth>
__global__ void __launch_bounds__(kCrossEntropyThreads)
    cross_entropy_bwd_kernel(const T* logits, const std::int64_t* __restrict__ labels,
                             const float* __restrict__ lse_in, const float* __restrict__ dloss_in,
                             T* dlogits, std::int64_t rows, int cols, std::int64_t first,
                             std::int64_t ignore) {
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    const T* x = logits + row * cols;
    T* dx = dlogits + row * cols;
    const std::int64_t label = labels[row];
    const bool ignored = label == ignore;
    const std::int64_t column = label - first;
    const float lse = lse_in[row];
    const float dloss = dloss_in[row];
    for (int p = threadIdx.x; p < cols / kWidth; p += blockDim.x) {
        Pack<T, kWidth> pack = load_pack<kWidth>(x + p * kWidth);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
            const float one = p * kWidth + j == column ? 1.0f : 0.0f;
            const float gradient = (__expf(to_float(pack.lane[j]) - lse) - one) * dloss;
            pack.lane[j] = from_float<T>(ignored ? 0.0f : gradient);
        }
        store_pack<kWidth>(dx + p * kWidth, pack);
    }
}

}  // namespace fastllm::cuda
