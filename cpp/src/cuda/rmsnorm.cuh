// RMSNorm kernels; formula and argument shapes are in fastllm/rmsnorm.hpp.
//
// A row belongs to threadIdx.y of a block: to one warp, or to the whole block. The first kPacks
// accesses of each thread stay in registers, so that a row is read from memory once; what is longer
// than that is read again in the second pass.
#pragma once

#include "column_sums.cuh"
#include "device.cuh"
#include "norm.cuh"

namespace fastllm::cuda {

inline constexpr int kRmsNormPacks = 4;

inline constexpr int kRmsNormFwdThreads = 1024;
inline constexpr int kRmsNormBwdThreads = 512;  // 128 registers each

template <int kWidth, class T>
__device__ __forceinline__ float sum_of_squares(const Pack<T, kWidth>& pack) {
    float total = 0.0f;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
        const float v = to_float(pack.lane[j]);
        total += v * v;
    }
    return total;
}

template <int kWidth, class T>
__device__ __forceinline__ Pack<T, kWidth> normalised(const Pack<T, kWidth>& h, const T* weight,
                                                      float rstd) {
    const Pack<T, kWidth> w = load_pack<kWidth>(weight);
    Pack<T, kWidth> y;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
        y.lane[j] = from_float<T>(to_float(h.lane[j]) * rstd * to_float(w.lane[j]));
    }
    return y;
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kRmsNormFwdThreads)
    rmsnorm_fwd_kernel(const T* x, const T* residual, const T* __restrict__ weight, T* y,
                       T* residual_out, float* rstd_out, std::int64_t rows, int cols, float eps) {
    FASTLLM_SHARED(WarpSums, sums);
    constexpr int kPacks = kRmsNormPacks;
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= rows) return;  // a whole warp: with several rows per block, no barrier follows
    const std::int64_t base = row * cols;
    const int packs = cols / kWidth;

    Pack<T, kWidth> kept[kPacks];
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        const int p = threadIdx.x + i * blockDim.x;
        if (p < packs) {
            kept[i] = norm_input<kWidth>(x, residual, residual_out, base + p * kWidth);
            squares += sum_of_squares(kept[i]);
        }
    }
    const int streamed = threadIdx.x + kPacks * blockDim.x;
    for (int p = streamed; p < packs; p += blockDim.x) {
        squares += sum_of_squares(norm_input<kWidth>(x, residual, residual_out, base + p * kWidth));
    }

    const float mean = row_sum(squares, sums) / static_cast<float>(cols);
    const float rstd = rsqrtf(mean + eps);
    if (threadIdx.x == 0) rstd_out[row] = rstd;

#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        const int p = threadIdx.x + i * blockDim.x;
        if (p < packs) {
            store_pack<kWidth>(y + base + p * kWidth,
                               normalised<kWidth>(kept[i], weight + p * kWidth, rstd));
        }
    }
    const T* h = residual != nullptr ? residual_out : x;
    for (int p = streamed; p < packs; p += blockDim.x) {
        const Pack<T, kWidth> again = load_pack<kWidth>(h + base + p * kWidth);
        store_pack<kWidth>(y + base + p * kWidth,
                           normalised<kWidth>(again, weight + p * kWidth, rstd));
    }
}

// Adds dy * h * rstd to `dweight`; returns sum(dy * h * rstd * weight).
template <int kWidth, class T>
__device__ __forceinline__ float accumulate_dweight(const Pack<T, kWidth>& dy,
                                                    const Pack<T, kWidth>& h, const T* weight,
                                                    float rstd, float (&dweight)[kWidth]) {
    const Pack<T, kWidth> w = load_pack<kWidth>(weight);
    float dot = 0.0f;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
        const float product = to_float(dy.lane[j]) * (to_float(h.lane[j]) * rstd);
        dweight[j] += product;
        dot += product * to_float(w.lane[j]);
    }
    return dot;
}

template <int kWidth, class T>
__device__ __forceinline__ void store_dx(const Pack<T, kWidth>& dy, const Pack<T, kWidth>& h,
                                         const T* weight, const T* dh, T* dx, float rstd,
                                         float mean) {
    const Pack<T, kWidth> w = load_pack<kWidth>(weight);
    Pack<T, kWidth> extra;
    if (dh != nullptr) extra = load_pack<kWidth>(dh);
    Pack<T, kWidth> out;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
        const float g = to_float(dy.lane[j]) * to_float(w.lane[j]);
        float v = rstd * (g - to_float(h.lane[j]) * rstd * mean);
        if (dh != nullptr) v += to_float(extra.lane[j]);
        out.lane[j] = from_float<T>(v);
    }
    store_pack<kWidth>(dx, out);
}

// Part `blockIdx.x * blockDim.y + threadIdx.y` takes every parts-th row.
template <class T, int kWidth>
__global__ void __launch_bounds__(kRmsNormBwdThreads)
    rmsnorm_bwd_kernel(const T* __restrict__ dy, const T* __restrict__ h,
                       const T* __restrict__ weight, const float* __restrict__ rstd_in,
                       const T* __restrict__ dh, T* __restrict__ dx, float* __restrict__ partial,
                       std::int64_t rows, int cols) {
    // Two sets in turn, so that one barrier per row suffices.
    FASTLLM_SHARED(WarpSums, even_sums);
    FASTLLM_SHARED(WarpSums, odd_sums);
    constexpr int kPacks = kRmsNormPacks;
    const std::int64_t part = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    const std::int64_t parts = static_cast<std::int64_t>(gridDim.x) * blockDim.y;
    const int packs = cols / kWidth;
    const int streamed = threadIdx.x + kPacks * blockDim.x;
    partial += part * cols;

    float dweight[kPacks][kWidth] = {};
    bool first = true;
    bool odd = false;
    for (std::int64_t row = part; row < rows; row += parts) {
        const std::int64_t base = row * cols;
        const float rstd = rstd_in[row];
        Pack<T, kWidth> kept_dy[kPacks];
        Pack<T, kWidth> kept_h[kPacks];
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
            const int p = threadIdx.x + i * blockDim.x;
            if (p < packs) {
                kept_dy[i] = load_pack<kWidth>(dy + base + p * kWidth);
                kept_h[i] = load_pack<kWidth>(h + base + p * kWidth);
                dot += accumulate_dweight<kWidth>(kept_dy[i], kept_h[i], weight + p * kWidth, rstd,
                                                  dweight[i]);
            }
        }
        for (int p = streamed; p < packs; p += blockDim.x) {
            float sums[kWidth] = {};
            dot += accumulate_dweight<kWidth>(load_pack<kWidth>(dy + base + p * kWidth),
                                              load_pack<kWidth>(h + base + p * kWidth),
                                              weight + p * kWidth, rstd, sums);
            add_to_partial<kWidth>(partial, sums, first, p, packs);
        }
        const float mean = row_sum(dot, odd ? odd_sums : even_sums) / static_cast<float>(cols);
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
            const int p = threadIdx.x + i * blockDim.x;
            if (p < packs) {
                const std::int64_t at = base + p * kWidth;
                store_dx<kWidth>(kept_dy[i], kept_h[i], weight + p * kWidth,
                                 dh != nullptr ? dh + at : nullptr, dx + at, rstd, mean);
            }
        }
        for (int p = streamed; p < packs; p += blockDim.x) {
            const std::int64_t at = base + p * kWidth;
            store_dx<kWidth>(load_pack<kWidth>(dy + at), load_pack<kWidth>(h + at),
                             weight + p * kWidth, dh != nullptr ? dh + at : nullptr, dx + at, rstd,
                             mean);
        }
        first = false;
        odd = !odd;
    }

#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        const int p = threadIdx.x + i * blockDim.x;
        if (p < packs) add_to_partial<kWidth>(partial, dweight[i], true, p, packs);
    }
    if (first) {  // a part without rows
        const float zeros[kWidth] = {};
        for (int p = streamed; p < packs; p += blockDim.x) {
            add_to_partial<kWidth>(partial, zeros, true, p, packs);
        }
    }
}

}  // namespace fastllm::cuda
