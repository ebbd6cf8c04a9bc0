// exp of a vector, to about 1 unit in the last place: x = n ln 2 + r with the product subtracted in
// two parts (Cody and Waite, "Software Manual for the Elementary Functions", 1980), then the Taylor
// series of exp(r), |r| <= 0.35, to degree 7, whose next term is below 6e-9.
//
// Overflows to infinity, underflows to 0 through denormals, keeps NaN.
#pragma once

#include "simd.hpp"

namespace fastllm::cpu::FASTLLM_ISA {

FASTLLM_INLINE Vec exponential(Vec x) {
    // 2^128 and 2^-150 are past what float holds; beyond them only n would overflow.
    const Vec bounded = minimum(broadcast(90.0f), maximum(broadcast(-105.0f), x));
    const Vec n = round_to_integer(bounded * broadcast(1.44269504f));
    Vec r = multiply_add(n, broadcast(-0.693359375f), bounded);
    r = multiply_add(n, broadcast(2.12194440e-4f), r);
    Vec p = broadcast(1.0f / 5040.0f);
    p = multiply_add(p, r, broadcast(1.0f / 720.0f));
    p = multiply_add(p, r, broadcast(1.0f / 120.0f));
    p = multiply_add(p, r, broadcast(1.0f / 24.0f));
    p = multiply_add(p, r, broadcast(1.0f / 6.0f));
    p = multiply_add(p, r, broadcast(0.5f));
    p = multiply_add(p, r, broadcast(1.0f));
    p = multiply_add(p, r, broadcast(1.0f));
    return scale_by_power_of_two(p, n);
}

}  // namespace fastllm::cpu::FASTLLM_ISA
