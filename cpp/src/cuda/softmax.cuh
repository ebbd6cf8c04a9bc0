// Softmax kernels; the formula is in fastllm/softmax.hpp. A row belongs to one warp, or to the
// whole block. The first kPacks accesses of each thread stay in registers, so that a row is read
// once; what is longer than that is read again.
#pragma once

#include "device.cuh"
#include "fastllm/softmax.hpp"

namespace fastllm::cuda {

inline constexpr int kSoftmaxPacks = 4;
inline constexpr int kSoftmaxThreads = 512;

// max and sum(exp(v - max)) of some scores, and NaN for the sum if one is NaN.
struct ScoreSum {
    float max;
    float sum;
};

__device__ __forceinline__ float no_score() { return __uint_as_float(0xff800000u); }

// exp(v - max), and 0 where v is -inf.
__device__ __forceinline__ float exp_of_score(float v, float max) {
    return v == no_score() ? 0.0f : __expf(v - max);
}

__device__ __forceinline__ ScoreSum joined(const ScoreSum& a, const ScoreSum& b) {
    const float max = a.max > b.max ? a.max : b.max;
    // A sum of NaN has the maximum of the scores beside it, which may be -inf.
    const float of_a = a.sum == 0.0f ? 0.0f : a.sum * exp_of_score(a.max, max);
    const float of_b = b.sum == 0.0f ? 0.0f : b.sum * exp_of_score(b.max, max);
    return {max, of_a + of_b};
}

struct WarpScoreSums {
    ScoreSum of_warp[1024 / kWarp];
};

__device__ __forceinline__ ScoreSum warp_joined(ScoreSum v) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        const ScoreSum other{__shfl_xor_sync(kAllLanes, v.max, offset),
                             __shfl_xor_sync(kAllLanes, v.sum, offset)};
        v = joined(v, other);
    }
    return v;
}

// As row_sum().
__device__ __forceinline__ ScoreSum row_joined(ScoreSum v, WarpScoreSums& warps) {
    v = warp_joined(v);
    if (blockDim.x == kWarp) return v;
    const unsigned lane = threadIdx.x % kWarp;
    if (lane == 0) warps.of_warp[threadIdx.x / kWarp] = v;
    __syncthreads();
    const ScoreSum none{no_score(), 0.0f};
    return warp_joined(lane < blockDim.x / kWarp ? warps.of_warp[lane] : none);
}

// Places that query i of a causal row has.
__device__ __forceinline__ std::int64_t causal_places(std::int64_t query, std::int64_t queries,
                                                      std::int64_t cols) {
    const std::int64_t places = query + (cols - queries) + 1;
    return places < 0 ? 0 : places > cols ? cols : places;
}

// What the scores of a row are made of.
struct RowScores {
    const std::uint8_t* mask;  // or null
    float scale;
    float slope;
    float at_first;  // what ALiBi adds at column 0
    int places;      // columns beyond have no score
};

__device__ __forceinline__ float score(float x, const RowScores& s, int c) {
    if (c >= s.places || (s.mask != nullptr && s.mask[c] == 0)) return no_score();
    return x * s.scale + (s.at_first + s.slope * static_cast<float>(c));
}

// The scores of the pack at column c; not read from memory where it has no place.
template <int kWidth, class T>
__device__ __forceinline__ void pack_scores(const T* x, const RowScores& s, int c,
                                            float (&out)[kWidth]) {
    if (c >= s.places) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) out[j] = no_score();
        return;
    }
    const Pack<T, kWidth> pack = load_pack<kWidth>(x + c);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) out[j] = score(to_float(pack.lane[j]), s, c + j);
}

template <int kWidth>
__device__ __forceinline__ ScoreSum sum_of_scores(const float (&v)[kWidth]) {
    ScoreSum here{v[0], 0.0f};
#pragma unroll
    for (int j = 1; j < kWidth; ++j) {
        if (v[j] > here.max || here.max != here.max) here.max = v[j];
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j) here.sum += exp_of_score(v[j], here.max);
    // A NaN alone leaves no maximum to compare with.
    if (here.max != here.max) here.max = no_score();
    return here;
}

// `places` counts from the pack's first column.
template <int kWidth, class T>
__device__ __forceinline__ void store_softmax(T* y, const float (&v)[kWidth], float max,
                                              float inverse, int places) {
    Pack<T, kWidth> out;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
        const float e = exp_of_score(v[j], max) * inverse;
        out.lane[j] = from_float<T>(j < places ? e : 0.0f);
    }
    store_pack<kWidth>(y, out);
}

// x may be y: a pack is read and written by one thread, in this order.
template <class T, int kWidth>
__global__ void __launch_bounds__(kSoftmaxThreads)
    softmax_fwd_kernel(const T* x, T* y, const SoftmaxFwd a) {
    FASTLLM_SHARED(WarpScoreSums, warps);
    constexpr int kPacks = kSoftmaxPacks;
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= a.batch * a.heads * a.queries) return;  // a whole warp: no barrier follows
    const std::int64_t query = row % a.queries;
    const std::int64_t head = row / a.queries % a.heads;
    const std::int64_t batch = row / (a.queries * a.heads);
    const int cols = static_cast<int>(a.cols);
    RowScores s{nullptr, a.scale, 0.0f, 0.0f, cols};
    if (a.causal) s.places = static_cast<int>(causal_places(query, a.queries, a.cols));
    if (a.mask != nullptr) {
        s.mask = a.mask + batch * a.mask_batch_stride + head * a.mask_head_stride +
                 query * a.mask_query_stride;
    }
    if (a.slopes != nullptr) {
        s.slope = a.slopes[head];
        s.at_first = -s.slope * static_cast<float>(query + (a.cols - a.queries));
    }
    x += row * a.cols;
    y += row * a.cols;

    float kept[kPacks][kWidth];
    ScoreSum mine{no_score(), 0.0f};
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        const int c = (threadIdx.x + i * blockDim.x) * kWidth;
        if (c < cols) {
            pack_scores<kWidth>(x, s, c, kept[i]);
            mine = joined(mine, sum_of_scores(kept[i]));
        }
    }
    const int streamed = (threadIdx.x + kPacks * blockDim.x) * kWidth;
    const int step = blockDim.x * kWidth;
    for (int c = streamed; c < cols; c += step) {
        float v[kWidth];
        pack_scores<kWidth>(x, s, c, v);
        mine = joined(mine, sum_of_scores(v));
    }
    const ScoreSum all = row_joined(mine, warps);
    const float inverse = all.sum == 0.0f ? 0.0f : 1.0f / all.sum;
    const float max = all.max == no_score() ? 0.0f : all.max;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        const int c = (threadIdx.x + i * blockDim.x) * kWidth;
        if (c < cols) store_softmax(y + c, kept[i], max, inverse, s.places - c);
    }
    for (int c = streamed; c < cols; c += step) {
        float v[kWidth];
        pack_scores<kWidth>(x, s, c, v);
        store_softmax(y + c, v, max, inverse, s.places - c);
    }
}

template <int kWidth, class T>
__device__ __forceinline__ float pack_dot(const Pack<T, kWidth>& a, const Pack<T, kWidth>& b,
                                          int places) {
    float total = 0.0f;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
        if (j < places) total += to_float(a.lane[j]) * to_float(b.lane[j]);
    }
    return total;
}

template <int kWidth, class T>
__device__ __forceinline__ void store_softmax_dx(T* dx, const Pack<T, kWidth>& dy,
                                                 const Pack<T, kWidth>& y, float dot, float scale,
                                                 int places) {
    Pack<T, kWidth> out;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
        const float v = (to_float(dy.lane[j]) - dot) * (to_float(y.lane[j]) * scale);
        out.lane[j] = from_float<T>(j < places ? v : 0.0f);
    }
    store_pack<kWidth>(dx, out);
}

// dx may be dy.
template <class T, int kWidth>
__global__ void __launch_bounds__(kSoftmaxThreads)
    softmax_bwd_kernel(const T* dy, const T* y, T* dx, std::int64_t rows, std::int64_t queries,
                       int cols, float scale, bool causal) {
    FASTLLM_SHARED(WarpSums, sums);
    constexpr int kPacks = kSoftmaxPacks;
    const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    const int places =
        causal ? static_cast<int>(causal_places(row % queries, queries, cols)) : cols;
    dy += row * cols;
    y += row * cols;
    dx += row * cols;

    Pack<T, kWidth> kept_dy[kPacks] = {};
    Pack<T, kWidth> kept_y[kPacks] = {};
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        const int c = (threadIdx.x + i * blockDim.x) * kWidth;
        if (c < places) {
            kept_dy[i] = load_pack<kWidth>(dy + c);
            kept_y[i] = load_pack<kWidth>(y + c);
            dot += pack_dot(kept_dy[i], kept_y[i], places - c);
        }
    }
    const int streamed = (threadIdx.x + kPacks * blockDim.x) * kWidth;
    const int step = blockDim.x * kWidth;
    for (int c = streamed; c < places; c += step) {
        dot += pack_dot(load_pack<kWidth>(dy + c), load_pack<kWidth>(y + c), places - c);
    }
    dot = row_sum(dot, sums);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
        const int c = (threadIdx.x + i * blockDim.x) * kWidth;
        if (c < cols) store_softmax_dx(dx + c, kept_dy[i], kept_y[i], dot, scale, places - c);
    }
    for (int c = streamed; c < cols; c += step) {
        Pack<T, kWidth> of_dy = {};
        Pack<T, kWidth> of_y = {};
        if (c < places) {
            of_dy = load_pack<kWidth>(dy + c);
            of_y = load_pack<kWidth>(y + c);
        }
        store_softmax_dx(dx + c, of_dy, of_y, dot, scale, places - c);
    }
}

}  // namespace fastllm::cuda
