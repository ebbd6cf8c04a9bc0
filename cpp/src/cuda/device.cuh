// What kernels include: the few spellings that differ between nvcc and the emulator (cpp/emulator),
// which compiles the same sources with a host compiler; packed loads and stores; conversions to
// float.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define FASTLLM_SHARED(Type, name) __shared__ Type name
#define FASTLLM_LAUNCH(kernel, grid, block, stream, ...) \
    kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#else
#include "cuda_on_host.hpp"
#define FASTLLM_SHARED(Type, name)    \
    static const char name##_key = 0; \
    Type& name = emulator::shared_variable<Type>(&name##_key)
#define FASTLLM_LAUNCH(kernel, grid, block, stream, ...) \
    emulator::launch(#kernel, kernel, grid, block, stream, __VA_ARGS__)
#endif

namespace fastllm::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float to_float(float value) { return value; }
// A shift, not __bfloat162float: on sm_90 that is a conversion instruction, whose results ptxas
// keeps in registers instead of the packed halves.
__device__ __forceinline__ float to_float(__nv_bfloat16 value) {
    return __uint_as_float(static_cast<unsigned>(__bfloat16_as_ushort(value)) << 16);
}
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
    return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
    return __float2half_rn(value);
}

// The widest pack of T: one 16-byte access.
template <class T>
inline constexpr int kPackWidth = 16 / sizeof(T);

// kWidth consecutive elements, held in registers. 16 bytes, and 4 elements of 16 bits, move in one
// access; any other width element by element.
template <class T, int kWidth>
struct alignas(kWidth * sizeof(T)) Pack {
    T lane[kWidth];
};

template <class T, int kWidth>
inline constexpr int kAccessBytes = kWidth * sizeof(T) == 16        ? 16
                                    : kWidth == 4 && sizeof(T) == 2 ? 8
                                                                    : sizeof(T);

template <int kWidth, class T>
__device__ __forceinline__ Pack<T, kWidth> load_pack(const T* p) {
    Pack<T, kWidth> pack;
    if constexpr (kAccessBytes<T, kWidth> == sizeof(T)) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) pack.lane[j] = p[j];
    } else {
#if defined(__CUDACC__)
        using Word = std::conditional_t<sizeof(pack) == 16, uint4, uint2>;
        *reinterpret_cast<Word*>(&pack) = *reinterpret_cast<const Word*>(p);
#else
        emulator::load(&pack, p, sizeof(pack));
#endif
    }
    return pack;
}

template <int kWidth, class T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, kWidth>& pack) {
    if constexpr (kAccessBytes<T, kWidth> == sizeof(T)) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) p[j] = pack.lane[j];
    } else {
#if defined(__CUDACC__)
        using Word = std::conditional_t<sizeof(pack) == 16, uint4, uint2>;
        *reinterpret_cast<Word*>(p) = *reinterpret_cast<const Word*>(&pack);
#else
        emulator::store(p, &pack, sizeof(pack));
#endif
    }
}

// Butterfly: every lane ends with the same sum, added in the same order.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(kAllLanes, value, offset);
    }
    return value;
}

// One slot per warp of the largest block.
struct WarpSums {
    float of_warp[1024 / kWarp];
};

// Sum over the threads of a block that share threadIdx.y: one warp (blockDim.x == 32), or the whole
// block (blockDim.y == 1). `sums` must not be written again before the block's next barrier.
__device__ __forceinline__ float row_sum(float value, WarpSums& sums) {
    value = warp_sum(value);
    if (blockDim.x == kWarp) return value;
    const unsigned lane = threadIdx.x % kWarp;
    if (lane == 0) sums.of_warp[threadIdx.x / kWarp] = value;
    __syncthreads();
    return warp_sum(lane < blockDim.x / kWarp ? sums.of_warp[lane] : 0.0f);
}

}  // namespace fastllm::cuda
