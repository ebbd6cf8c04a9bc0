// Sums over rows, column by column, in two stages and a fixed order: each part (a block, or a warp
// of it) writes its own sums, and column_sums_kernel adds the parts.
#pragma once

#include "device.cuh"

namespace fastllm::cuda {

// Where element `j` of pack `p` of a part's sums lies. Lanes of a warp hold consecutive packs;
// keeping quarters of packs together makes their 16-byte stores touch whole sectors.
template <int kWidth>
__device__ __forceinline__ int partial_offset(int p, int j, int packs) {
    constexpr int kChunk = kWidth < 4 ? kWidth : 4;
    return ((j / kChunk) * packs + p) * kChunk + j % kChunk;
}

// Adds `sums` to (or with `first`, writes it over) the part's sums for pack p.
template <int kWidth>
__device__ __forceinline__ void add_to_partial(float* partial, const float (&sums)[kWidth],
                                               bool first, int p, int packs) {
    constexpr int kChunk = kWidth < 4 ? kWidth : 4;
#pragma unroll
    for (int j = 0; j < kWidth; j += kChunk) {
        float* where = partial + partial_offset<kWidth>(p, j, packs);
        Pack<float, kChunk> out;
        if (!first) out = load_pack<kChunk>(where);
#pragma unroll
        for (int k = 0; k < kChunk; ++k) {
            out.lane[k] = sums[j + k] + (first ? 0.0f : out.lane[k]);
        }
        store_pack<kChunk>(where, out);
    }
}

inline constexpr int kReduceLanes = 16;

struct ReduceSums {
    float of[kReduceLanes][kWarp];
};

// out from the parts' sums: 32 positions per block, the parts divided over kReduceLanes
// threads.
template <class T, int kWidth>
__global__ void __launch_bounds__(kWarp* kReduceLanes)
    column_sums_kernel(const float* __restrict__ partial, T* __restrict__ out, int parts,
                       int cols) {
    FASTLLM_SHARED(ReduceSums, sums);
    const int position = blockIdx.x * kWarp + threadIdx.x;
    float total = 0.0f;
    if (position < cols) {
        for (int part = threadIdx.y; part < parts; part += kReduceLanes) {
            total += partial[static_cast<std::int64_t>(part) * cols + position];
        }
    }
    sums.of[threadIdx.y][threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.y != 0 || position >= cols) return;
    float sum = 0.0f;
#pragma unroll
    for (int lane = 0; lane < kReduceLanes; ++lane) sum += sums.of[lane][threadIdx.x];
    // The inverse of partial_offset.
    constexpr int kChunk = kWidth < 4 ? kWidth : 4;
    const int packs = cols / kWidth;
    const int chunk = position / kChunk;
    const int column = chunk % packs * kWidth + chunk / packs * kChunk + position % kChunk;
    out[column] = from_float<T>(sum);
}

}  // namespace fastllm::cuda
