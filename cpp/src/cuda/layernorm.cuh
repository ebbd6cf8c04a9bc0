// LayerNorm kernels; formula and argument shapes are in fastllm/layernorm.hpp.
//
// A row belongs to threadIdx.y of a block: to one warp, or to the whole block. The first kPacks
// accesses of each thread stay in registers, so that a row is read from memory once; what is longer
// than that is read again in each pass.
#pragma once

#include "column_sums.cuh"
#include "device.cuh"
#include "norm.cuh"

namespace fastllm::cuda {

inline constexpr int kLayerNormPacks = 4;
inline constexpr int kLayerNormFwdThreads = 1024;
inline constexpr int kLayerNormBwdPacks = 2;  // two sums per column are kept in registers
inline constexpr int kLayerNormBwdThreads = 512;

template <int kWidth, class T>
__device__ __forceinline__ float pack_sum(const Pack<T, kWidth>& pack) {
    float total = 0.0f;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) total += to_float(pack.lane[j]);
    return total;
}

template <int kWidth, class T>
__device__ __forceinline__ float squares_about(const Pack<T, kWidth>& pack, float mean) {
    float total = 0.0f;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
        const float d = to_float(pack.lane[j]) - mean;
        total += d * d;
    }
    return total;
}

// bias may be null.
template <int kWidth, class T>
__device__ __forceinline__ void store_layernorm(const Pack<T, kWidth>& h, const T* weight,
                                                const T* bias, T* y, float mean, float rstd) {
    const Pack<T, kWidth> w = load_pack<kWidth>(weight);
    Pack<T, kWidth> b;
    if (bias != nullptr) b = load_pack<kWidth>(bias);
    Pack<T, kWidth> out;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
        float v = (to_float(h.lane[j]) - mean) * rstd * to_float(w.lane[j]);
        if (bias != nullptr) v += to_float(b.lane[j]);
        out.lane[j] = from_float<T>(v);
    }
    store_pack<kWidth>(y, out);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kLayerNormFwdThreads)
    layernorm_fwd_kernel(const T* x, const T* residual, const T* __restrict__ weight,
                         const T* __restrict__ bias, T* y, T* residual_out, float* mean_out,
                         float* rstd_out, std::int64_t rows, int cols, float eps) {
    FASTLLM_SHARED(WarpSums, sums);
    FASTLLM_SHARED(WarpSums, squares_of);
    constexpr int kPacks = kLayerNormPacks;
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= rows) return;  // a whole warp: with several rows per block, no barrier follows
    const std::int64_t base = row * cols;
    const int packs = cols / kWidth;
    const int streamed = threadIdx.x + kPacks * blockDim.x;

    Pack<T, kWidth> kept[kPacks];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        const int p = threadIdx.x + i * blockDim.x;
        if (p < packs) {
            kept[i] = norm_input<kWidth>(x, residual, residual_out, base + p * kWidth);
            sum += pack_sum(kept[i]);
        }
    }
    for (int p = streamed; p < packs; p += blockDim.x) {
        sum += pack_sum(norm_input<kWidth>(x, residual, residual_out, base + p * kWidth));
    }
    const float mean = row_sum(sum, sums) / static_cast<float>(cols);

    const T* h = residual != nullptr ? residual_out : x;
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        const int p = threadIdx.x + i * blockDim.x;
        if (p < packs) squares += squares_about(kept[i], mean);
    }
    for (int p = streamed; p < packs; p += blockDim.x) {
        squares += squares_about(load_pack<kWidth>(h + base + p * kWidth), mean);
    }
    const float variance = row_sum(squares, squares_of) / static_cast<float>(cols);
    const float rstd = rsqrtf(variance + eps);
    if (threadIdx.x == 0) {
        mean_out[row] = mean;
        rstd_out[row] = rstd;
    }

#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        const int c = (threadIdx.x + i * blockDim.x) * kWidth;
        if (c < cols) {
            store_layernorm<kWidth>(kept[i], weight + c, bias != nullptr ? bias + c : nullptr,
                                    y + base + c, mean, rstd);
        }
    }
    for (int p = streamed; p < packs; p += blockDim.x) {
        const int c = p * kWidth;
        store_layernorm<kWidth>(load_pack<kWidth>(h + base + c), weight + c,
                                bias != nullptr ? bias + c : nullptr, y + base + c, mean, rstd);
    }
}

// sum(g) and sum(g * n) of some elements.
struct LayerNormDots {
    float g;
    float gn;
};

// Adds dy * n to `dweight` and dy to `dbias`.
template <int kWidth, class T>
__device__ __forceinline__ void accumulate_layernorm(const Pack<T, kWidth>& dy,
                                                     const Pack<T, kWidth>& h, const T* weight,
                                                     float mean, float rstd,
                                                     float (&dweight)[kWidth],
                                                     float (&dbias)[kWidth], LayerNormDots& dots) {
    const Pack<T, kWidth> w = load_pack<kWidth>(weight);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
        const float d = to_float(dy.lane[j]);
        const float product = d * ((to_float(h.lane[j]) - mean) * rstd);
        dweight[j] += product;
        dbias[j] += d;
        dots.g += d * to_float(w.lane[j]);
        dots.gn += product * to_float(w.lane[j]);
    }
}

// `dots` are means over the row here.
template <int kWidth, class T>
__device__ __forceinline__ void store_layernorm_dx(const Pack<T, kWidth>& dy,
                                                   const Pack<T, kWidth>& h, const T* weight,
                                                   const T* dh, T* dx, float mean, float rstd,
                                                   const LayerNormDots& dots) {
    const Pack<T, kWidth> w = load_pack<kWidth>(weight);
    Pack<T, kWidth> extra;
    if (dh != nullptr) extra = load_pack<kWidth>(dh);
    Pack<T, kWidth> out;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
        const float g = to_float(dy.lane[j]) * to_float(w.lane[j]);
        const float n = (to_float(h.lane[j]) - mean) * rstd;
        float v = rstd * (g - dots.g - n * dots.gn);
        if (dh != nullptr) v += to_float(extra.lane[j]);
        out.lane[j] = from_float<T>(v);
    }
    store_pack<kWidth>(dx, out);
}

struct LayerNormSums {
    WarpSums g;
    WarpSums gn;
};

// Part `blockIdx.x * blockDim.y + threadIdx.y` takes every parts-th row.
template <class T, int kWidth>
__global__ void __launch_bounds__(kLayerNormBwdThreads)
    layernorm_bwd_kernel(const T* __restrict__ dy, const T* __restrict__ h,
                         const T* __restrict__ weight, const float* __restrict__ mean_in,
                         const float* __restrict__ rstd_in, const T* __restrict__ dh,
                         T* __restrict__ dx, float* __restrict__ partial, std::int64_t rows,
                         int cols) {
    // One set suffices: between a sum and its next use lies the other sum's barrier.
    FASTLLM_SHARED(LayerNormSums, sums);
    constexpr int kPacks = kLayerNormBwdPacks;
    const std::int64_t part = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    const std::int64_t parts = static_cast<std::int64_t>(gridDim.x) * blockDim.y;
    const int packs = cols / kWidth;
    const int streamed = threadIdx.x + kPacks * blockDim.x;
    float* weight_sums = partial + part * cols;
    float* bias_sums = partial + (parts + part) * cols;

    float dweight[kPacks][kWidth] = {};
    float dbias[kPacks][kWidth] = {};
    bool first = true;
    for (std::int64_t row = part; row < rows; row += parts) {
        const std::int64_t base = row * cols;
        const float mean = mean_in[row];
        const float rstd = rstd_in[row];
        Pack<T, kWidth> kept_dy[kPacks];
        Pack<T, kWidth> kept_h[kPacks];
        LayerNormDots dots{0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
            const int p = threadIdx.x + i * blockDim.x;
            if (p < packs) {
                kept_dy[i] = load_pack<kWidth>(dy + base + p * kWidth);
                kept_h[i] = load_pack<kWidth>(h + base + p * kWidth);
                accumulate_layernorm<kWidth>(kept_dy[i], kept_h[i], weight + p * kWidth, mean, rstd,
                                             dweight[i], dbias[i], dots);
            }
        }
        for (int p = streamed; p < packs; p += blockDim.x) {
            float of_weight[kWidth] = {};
            float of_bias[kWidth] = {};
            accumulate_layernorm<kWidth>(load_pack<kWidth>(dy + base + p * kWidth),
                                         load_pack<kWidth>(h + base + p * kWidth),
                                         weight + p * kWidth, mean, rstd, of_weight, of_bias, dots);
            add_to_partial<kWidth>(weight_sums, of_weight, first, p, packs);
            add_to_partial<kWidth>(bias_sums, of_bias, first, p, packs);
        }
        dots.g = row_sum(dots.g, sums.g) / static_cast<float>(cols);
        dots.gn = row_sum(dots.gn, sums.gn) / static_cast<float>(cols);
#pragma unroll
        for (int i = 0; i < kPacks; ++i) {
            const int c = (threadIdx.x + i * blockDim.x) * kWidth;
            if (c < cols) {
                store_layernorm_dx<kWidth>(kept_dy[i], kept_h[i], weight + c,
                                           dh != nullptr ? dh + base + c : nullptr, dx + base + c,
                                           mean, rstd, dots);
            }
        }
        for (int p = streamed; p < packs; p += blockDim.x) {
            const int c = p * kWidth;
            store_layernorm_dx<kWidth>(
                load_pack<kWidth>(dy + base + c), load_pack<kWidth>(h + base + c), weight + c,
                dh != nullptr ? dh + base + c : nullptr, dx + base + c, mean, rstd, dots);
        }
        first = false;
    }

#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        const int p = threadIdx.x + i * blockDim.x;
        if (p < packs) {
            add_to_partial<kWidth>(weight_sums, dweight[i], true, p, packs);
            add_to_partial<kWidth>(bias_sums, dbias[i], true, p, packs);
        }
    }
    if (first) {  // a part without rows
        const float zeros[kWidth] = {};
        for (int p = streamed; p < packs; p += blockDim.x) {
            add_to_partial<kWidth>(weight_sums, zeros, true, p, packs);
            add_to_partial<kWidth>(bias_sums, zeros, true, p, packs);
        }
    }
}

}  // namespace fastllm::cuda
