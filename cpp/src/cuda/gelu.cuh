// The logistic function, and GELU by it: gelu(v) = v * s(v), of which kernels also need the slope.
#pragma once

#include "device.cuh"

namespace fastllm::cuda {

// v * s is the activation, s + v * s * (1 - s) * slope its derivative.
struct Gate {
    float s;
    float slope;
};

__device__ __forceinline__ float logistic(float z) { return __fdividef(1.0f, 1.0f + __expf(-z)); }

__device__ __forceinline__ Gate gelu_gate(float v) {
    constexpr float kScale = 1.5957691216057308f;  // 2 sqrt(2/pi)
    constexpr float kCubic = 0.044715f;
    // Beyond 30, s is 0 or 1 in float; the cube and the slope must not overflow. NaN stays.
    const float c = v > 30.0f ? 30.0f : v < -30.0f ? -30.0f : v;
    return {logistic(kScale * (c + kCubic * c * c * c)), kScale * (1.0f + 3.0f * kCubic * c * c)};
}

__device__ __forceinline__ float derivative(float v, const Gate& at) {
    return at.s + v * at.s * (1.0f - at.s) * at.slope;
}

}  // namespace fastllm::cuda
