// The logistic function, and GELU by it: gelu(v) = v * s(v), of which the kernels also need the
// slope.
#pragma once

#include "exp.hpp"

namespace fastllm::cpu::FASTLLM_ISA {

// v * s is the activation, s + v * s * (1 - s) * slope its derivative.
template <class V>
struct Gate {
    V s;
    V slope;
};

// 1 / (1 + exp(-v * scale)).
template <class V>
FASTLLM_INLINE V logistic(V v, V scale) {
    return reciprocal(power_of_two(v * (scale * broadcast(-kLog2OfE))) + broadcast(1.0f));
}

template <class V>
FASTLLM_INLINE Gate<V> gelu_gate(V v) {
    constexpr float kScale = 1.5957691216057308f;  // 2 sqrt(2/pi)
    constexpr float kCubic = 0.044715f;
    // Beyond 30, s is 0 or 1 in float; the cube and the slope must not overflow.
    const V c = minimum(V(broadcast(30.0f)), maximum(V(broadcast(-30.0f)), v));
    const V square = c * c;
    const V scale = multiply_add(square, broadcast(kScale * kCubic), broadcast(kScale));
    const V slope = multiply_add(square, broadcast(3.0f * kScale * kCubic), broadcast(kScale));
    return {logistic(c, scale), slope};
}

template <class V>
FASTLLM_INLINE V derivative(V v, const Gate<V>& at) {
    return multiply_add(v * at.s * (broadcast(1.0f) - at.s), at.slope, at.s);
}

}  // namespace fastllm::cpu::FASTLLM_ISA
