// exp of a vector: 2^t with t = x log2(e) = n + r, and a polynomial for 2^r whose coefficients make
// the largest relative error over |r| <= 1/2, 9e-8, as small as degree 5 allows (fitted to 2^r /
// 2^r by Lawson's reweighted least squares). Rounding t adds 6e-8 |x|.
//
// Overflows to infinity, underflows to 0 through denormals, keeps NaN.
#pragma once

#include "simd.hpp"

namespace fastllm::cpu::FASTLLM_ISA {

FASTLLM_INLINE Vec power_of_two(Vec t) {
    Vec n, r;
    split_at_integer(t, n, r);
    Vec p = broadcast(0.001326472731307149f);
    p = multiply_add(p, r, broadcast(0.009671512991189957f));
    p = multiply_add(p, r, broadcast(0.05550733581185341f));
    p = multiply_add(p, r, broadcast(0.24022242426872253f));
    p = multiply_add(p, r, broadcast(0.6931470036506653f));
    p = multiply_add(p, r, broadcast(1.0f));
    return scale_by_power_of_two(p, n);
}
FASTLLM_INLINE VecPair power_of_two(VecPair t) { return {power_of_two(t.a), power_of_two(t.b)}; }

inline constexpr float kLog2OfE = 1.44269504f;

template <class V>
FASTLLM_INLINE V exponential(V x) {
    return power_of_two(x * broadcast(kLog2OfE));
}

}  // namespace fastllm::cpu::FASTLLM_ISA
