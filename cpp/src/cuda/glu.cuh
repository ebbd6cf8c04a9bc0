// Kernels of gated linear units; the formula is in fastllm/glu.hpp.
#pragma once

#include "device.cuh"
#include "fastllm/glu.hpp"
#include "gelu.cuh"

namespace fastllm::cuda {

inline constexpr int kGluThreads = 256;

template <GluActivation kActivation>
__device__ __forceinline__ Gate gate_of(float v) {
    if constexpr (kActivation == GluActivation::kGelu) return gelu_gate(v);
    return {logistic(v), 1.0f};
}

// One pack per thread; the elements after the last whole pack go one by one.
template <class T, int kWidth, GluActivation kActivation>
__global__ void __launch_bounds__(kGluThreads)
    glu_fwd_kernel(const T* gate, const T* up, T* y, std::int64_t count) {
    const std::int64_t begin =
        (static_cast<std::int64_t>(blockIdx.x) * kGluThreads + threadIdx.x) * kWidth;
    const auto value = [](T g, T u) {
        const float v = to_float(g);
        return from_float<T>(v * gate_of<kActivation>(v).s * to_float(u));
    };
    if (begin + kWidth <= count) {
        const Pack<T, kWidth> g = load_pack<kWidth>(gate + begin);
        const Pack<T, kWidth> u = load_pack<kWidth>(up + begin);
        Pack<T, kWidth> out;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) out.lane[j] = value(g.lane[j], u.lane[j]);
        store_pack<kWidth>(y + begin, out);
    } else {
        for (std::int64_t i = begin; i < count; ++i) y[i] = value(gate[i], up[i]);
    }
}

template <class T>
struct GluGradient {
    T dgate;
    T dup;
};

template <GluActivation kActivation, class T>
__device__ __forceinline__ GluGradient<T> glu_gradient(T dy, T gate, T up) {
    const float d = to_float(dy);
    const float g = to_float(gate);
    const Gate at = gate_of<kActivation>(g);
    return {from_float<T>(d * to_float(up) * derivative(g, at)), from_float<T>(d * (g * at.s))};
}

template <class T, int kWidth, GluActivation kActivation>
__global__ void __launch_bounds__(kGluThreads)
    glu_bwd_kernel(const T* dy, const T* gate, const T* up, T* dgate, T* dup, std::int64_t count) {
    const std::int64_t begin =
        (static_cast<std::int64_t>(blockIdx.x) * kGluThreads + threadIdx.x) * kWidth;
    if (begin + kWidth <= count) {
        const Pack<T, kWidth> d = load_pack<kWidth>(dy + begin);
        const Pack<T, kWidth> g = load_pack<kWidth>(gate + begin);
        const Pack<T, kWidth> u = load_pack<kWidth>(up + begin);
        Pack<T, kWidth> out_gate;
        Pack<T, kWidth> out_up;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
            const auto gradient = glu_gradient<kActivation>(d.lane[j], g.lane[j], u.lane[j]);
            out_gate.lane[j] = gradient.dgate;
            out_up.lane[j] = gradient.dup;
        }
        store_pack<kWidth>(dgate + begin, out_gate);
        store_pack<kWidth>(dup + begin, out_up);
    } else {
        for (std::int64_t i = begin; i < count; ++i) {
            const auto gradient = glu_gradient<kActivation>(dy[i], gate[i], up[i]);
            dgate[i] = gradient.dgate;
            dup[i] = gradient.dup;
        }
    }
}

}  // namespace fastllm::cuda
