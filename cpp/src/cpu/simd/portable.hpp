// Four floats in the vector types that GCC and Clang have for every target: SSE2 and NEON
// registers, or plain instructions where there are none.
#pragma once

#include <cmath>
#include <cstdint>

#include "fastllm/dtype.hpp"

namespace fastllm::cpu::portable {

inline constexpr int kWidth = 4;

using Floats = float __attribute__((vector_size(16)));
using Words = std::uint32_t __attribute__((vector_size(16)));
using Integers = std::int32_t __attribute__((vector_size(16)));
using HalfWords = std::uint16_t __attribute__((vector_size(8)));
using HalfIntegers = std::int16_t __attribute__((vector_size(8)));

struct Vec {
    Floats v;
};

// All kWidth lanes, or the first `count` of them; lanes that are not loaded are 0.
struct AllLanes {};
struct FirstLanes {
    int count;
};

// The same bits as another type of the same size.
template <class To, class From>
FASTLLM_INLINE To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

FASTLLM_INLINE Vec broadcast(float value) { return {Floats{value, value, value, value}}; }

FASTLLM_INLINE Vec load(const float* p, AllLanes) {
    Vec out;
    std::memcpy(&out.v, p, sizeof out.v);
    return out;
}
FASTLLM_INLINE Vec load(const bfloat16* p, AllLanes) {
    HalfWords half;
    std::memcpy(&half, p, sizeof half);
    return {same_bits<Floats>(__builtin_convertvector(half, Words) << 16)};
}
FASTLLM_INLINE Vec load(const float16* p, AllLanes) {
    return {Floats{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
template <class T>
FASTLLM_INLINE Vec load(const T* p, FirstLanes lanes) {
    T copy[kWidth] = {};
    for (int i = 0; i < lanes.count; ++i) copy[i] = p[i];
    return load(copy, AllLanes{});
}

FASTLLM_INLINE void store(float* p, Vec v, AllLanes) { std::memcpy(p, &v.v, sizeof v.v); }
FASTLLM_INLINE void store(bfloat16* p, Vec v, AllLanes) {
    const Words bits = same_bits<Words>(v.v);
    const Words upper = bits >> 16;
    const Words rounded = (bits + 0x7fffu + (upper & 1u)) >> 16;
    const Words words = v.v == v.v ? rounded : (upper | 0x40u);
    const HalfWords half = __builtin_convertvector(words, HalfWords);
    std::memcpy(p, &half, sizeof half);
}
FASTLLM_INLINE void store(float16* p, Vec v, AllLanes) {
    for (int i = 0; i < kWidth; ++i) p[i] = from_float<float16>(v.v[i]);
}
template <class T>
FASTLLM_INLINE void store(T* p, Vec v, FirstLanes lanes) {
    T copy[kWidth];
    store(copy, v, AllLanes{});
    for (int i = 0; i < lanes.count; ++i) p[i] = copy[i];
}

// float32 whose bits are those of a bfloat16 times 2^16, plus an int16: halves, rounded to nearest
// with ties away from zero. Any NaN keeps its upper half alone, made quiet.
FASTLLM_INLINE Vec load_halves(const bfloat16* upper, const std::int16_t* lower, AllLanes lanes) {
    HalfIntegers half;
    std::memcpy(&half, lower, sizeof half);
    const Words low = same_bits<Words>(__builtin_convertvector(half, Integers));
    return {same_bits<Floats>(same_bits<Words>(load(upper, lanes).v) + low)};
}
FASTLLM_INLINE void store_halves(bfloat16* upper, std::int16_t* lower, Vec v, AllLanes) {
    const Words exact = same_bits<Words>(v.v);
    const Words bits = v.v == v.v ? exact : ((exact | 0x400000u) & 0xffff0000u);
    const HalfWords high = __builtin_convertvector((bits + 0x8000u) >> 16, HalfWords);
    const HalfWords low = __builtin_convertvector(bits & 0xffffu, HalfWords);
    std::memcpy(upper, &high, sizeof high);
    std::memcpy(lower, &low, sizeof low);
}

// 2 * kWidth consecutive elements, the first kWidth in `a`.
template <class T>
FASTLLM_INLINE void load_pair(const T* p, Vec& a, Vec& b) {
    a = load(p, AllLanes{});
    b = load(p + kWidth, AllLanes{});
}
template <class T>
FASTLLM_INLINE void store_pair(T* p, Vec a, Vec b) {
    store(p, a, AllLanes{});
    store(p + kWidth, b, AllLanes{});
}

// There is no portable way around the cache: these are ordinary stores.
template <class T>
FASTLLM_INLINE bool can_stream(const T*) {
    return false;
}
template <class T, class Lanes>
FASTLLM_INLINE void store_streaming(T* p, Vec v, Lanes lanes) {
    store(p, v, lanes);
}
template <class T>
FASTLLM_INLINE void store_pair_streaming(T* p, Vec a, Vec b) {
    store_pair(p, a, b);
}
FASTLLM_INLINE void finish_streaming() {}

FASTLLM_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
FASTLLM_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
FASTLLM_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
FASTLLM_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }

// a * b + c; rounded once only where the target does that in one instruction.
FASTLLM_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }

// The second operand where either is NaN, as the x86 instructions do.
FASTLLM_INLINE Vec minimum(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
FASTLLM_INLINE Vec maximum(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }

FASTLLM_INLINE bool any_above(Vec a, Vec b) {
    bool any = false;
    for (int i = 0; i < kWidth; ++i) any |= a.v[i] > b.v[i];
    return any;
}

// To the nearest integer, for |value| < 2^22.
FASTLLM_INLINE Vec round_to_integer(Vec a) {
    const Floats shift =
        broadcast(12582912.0f).v;  // 1.5 * 2^23, where the unit in the last place is 1
    return {(a.v + shift) - shift};
}

FASTLLM_INLINE Vec reciprocal(Vec a) { return broadcast(1.0f) / a; }

// t = n + r with n integral and |r| <= 1/2, for |t| < 2^22; beyond what 2^t can be in float, t is
// first brought to the nearest bound.
FASTLLM_INLINE void split_at_integer(Vec t, Vec& n, Vec& r) {
    const Vec bounded = minimum(broadcast(130.0f), maximum(broadcast(-152.0f), t));
    n = round_to_integer(bounded);
    r = bounded - n;
}

// v * 2^n for integral n from -200 to 200, in two steps because 2^n may be out of range by itself.
FASTLLM_INLINE Vec scale_by_power_of_two(Vec v, Vec n) {
    const Floats finite = n.v == n.v ? n.v : Floats{};  // NaN has no integer
    const Integers whole = __builtin_convertvector(finite, Integers);
    const Integers half = whole >> 1;
    const Floats first = same_bits<Floats>((half + 127) << 23);
    const Floats second = same_bits<Floats>((whole - half + 127) << 23);
    return {v.v * first * second};
}

// From 2 * kWidth consecutive values, those at even and at odd places; and back.
FASTLLM_INLINE void split_pairs(Vec first, Vec second, Vec& even, Vec& odd) {
    even.v = Floats{first.v[0], first.v[2], second.v[0], second.v[2]};
    odd.v = Floats{first.v[1], first.v[3], second.v[1], second.v[3]};
}
FASTLLM_INLINE void join_pairs(Vec even, Vec odd, Vec& first, Vec& second) {
    first.v = Floats{even.v[0], odd.v[0], even.v[1], odd.v[1]};
    second.v = Floats{even.v[2], odd.v[2], even.v[3], odd.v[3]};
}

FASTLLM_INLINE float largest(Vec a) {
    const float x = a.v[0] > a.v[1] ? a.v[0] : a.v[1];
    const float y = a.v[2] > a.v[3] ? a.v[2] : a.v[3];
    return x > y ? x : y;
}

FASTLLM_INLINE Vec square_root(Vec a) {
    return {Floats{std::sqrt(a.v[0]), std::sqrt(a.v[1]), std::sqrt(a.v[2]), std::sqrt(a.v[3])}};
}

FASTLLM_INLINE float first_lane(Vec a) { return a.v[0]; }

FASTLLM_INLINE float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }

FASTLLM_INLINE float square_root(float value) { return std::sqrt(value); }

}  // namespace fastllm::cpu::portable
