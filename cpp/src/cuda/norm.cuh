// What RMSNorm and LayerNorm have in common: where their input comes from.
#pragma once

#include "device.cuh"

namespace fastllm::cuda {

// h = x + residual, rounded and stored, or x itself.
template <int kWidth, class T>
__device__ __forceinline__ Pack<T, kWidth> norm_input(const T* x, const T* residual,
                                                      T* residual_out, std::int64_t offset) {
    Pack<T, kWidth> h = load_pack<kWidth>(x + offset);
    if (residual != nullptr) {
        const Pack<T, kWidth> r = load_pack<kWidth>(residual + offset);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
            h.lane[j] = from_float<T>(to_float(h.lane[j]) + to_float(r.lane[j]));
        }
        store_pack<kWidth>(residual_out + offset, h);
    }
    return h;
}

}  // namespace fastllm::cuda
