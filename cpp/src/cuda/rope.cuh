// Rotary embedding kernel; the formula is in fastllm/rope.hpp.
//
// A block turns one token: threads along x take packs of pairs, whose angles they keep, and go over
// the heads along y.
#pragma once

#include "device.cuh"
#include "fastllm/rope.hpp"

namespace fastllm::cuda {

inline constexpr int kRopeThreads = 256;

template <class T>
struct RopeArguments {
    int tokens;
    int heads;
    int head_dim;
    int rotary_dim;
    float sign;
    const T* x;
    RopeStrides x_strides;
    const float* cos;
    const float* sin;
    std::int64_t table_rows;
    const std::int64_t* positions;
    T* y;
    RopeStrides y_strides;
};

template <int kCount>
__device__ __forceinline__ void load_angles(const float* table, float (&angles)[kCount]) {
    constexpr int kStep = kCount % 4 == 0 ? 4 : 1;
#pragma unroll
    for (int j = 0; j < kCount; j += kStep) {
        const Pack<float, kStep> pack = load_pack<kStep>(table + j);
#pragma unroll
        for (int k = 0; k < kStep; ++k) angles[j + k] = pack.lane[k];
    }
}

// `first` and `second` are the channels of a pair.
template <class T>
__device__ __forceinline__ void turn(T& first, T& second, float cos, float sin) {
    const float a = to_float(first);
    const float b = to_float(second);
    first = from_float<T>(a * cos - b * sin);
    second = from_float<T>(b * cos + a * sin);
}

// kWidth channels per access: kWidth pairs half-split, kWidth / 2 interleaved (then kWidth is
// even).
template <class T, int kWidth, bool kInterleaved>
__global__ void __launch_bounds__(kRopeThreads) rope_kernel(const RopeArguments<T> r) {
    constexpr int kPairs = kInterleaved ? kWidth / 2 : kWidth;
    const int token = static_cast<int>(blockIdx.x % r.tokens);
    const std::int64_t batch = blockIdx.x / r.tokens;
    const std::int64_t row = r.positions != nullptr ? r.positions[blockIdx.x] : token;
    const bool known = row >= 0 && row < r.table_rows;
    const int half = r.rotary_dim / 2;
    const T* x = r.x + batch * r.x_strides.batch + token * r.x_strides.token;
    T* y = r.y + batch * r.y_strides.batch + token * r.y_strides.token;

    for (int pair = threadIdx.x * kPairs; pair < half; pair += blockDim.x * kPairs) {
        float cos[kPairs];
        float sin[kPairs];
        if (known) {
            load_angles<kPairs>(r.cos + row * half + pair, cos);
            load_angles<kPairs>(r.sin + row * half + pair, sin);
#pragma unroll
            for (int j = 0; j < kPairs; ++j) sin[j] *= r.sign;
        } else {
#pragma unroll
            for (int j = 0; j < kPairs; ++j) cos[j] = sin[j] = __uint_as_float(0x7fc00000u);
        }
        for (int head = threadIdx.y; head < r.heads; head += blockDim.y) {
            const T* from = x + head * r.x_strides.head;
            T* to = y + head * r.y_strides.head;
            if constexpr (kInterleaved) {
                Pack<T, kWidth> v = load_pack<kWidth>(from + 2 * pair);
#pragma unroll
                for (int j = 0; j < kPairs; ++j)
                    turn(v.lane[2 * j], v.lane[2 * j + 1], cos[j], sin[j]);
                store_pack<kWidth>(to + 2 * pair, v);
            } else {
                Pack<T, kWidth> a = load_pack<kWidth>(from + pair);
                Pack<T, kWidth> b = load_pack<kWidth>(from + half + pair);
#pragma unroll
                for (int j = 0; j < kPairs; ++j) turn(a.lane[j], b.lane[j], cos[j], sin[j]);
                store_pack<kWidth>(to + pair, a);
                store_pack<kWidth>(to + half + pair, b);
            }
        }
    }
    if (r.x == r.y) return;
    for (int head = threadIdx.y; head < r.heads; head += blockDim.y) {
        for (int c = r.rotary_dim + threadIdx.x; c < r.head_dim; c += blockDim.x) {
            y[head * r.y_strides.head + c] = x[head * r.x_strides.head + c];
        }
    }
}

}  // namespace fastllm::cuda
