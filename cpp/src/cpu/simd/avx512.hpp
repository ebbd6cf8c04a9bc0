// Sixteen floats in an AVX-512 register. Included only where the file is compiled for x86-64-v4.
//
// VCVTNEPS2BF16 (AVX512_BF16) is not used: it flushes denormals to zero, and not every x86-64-v4
// processor has it.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "fastllm/dtype.hpp"

namespace fastllm::cpu::avx512 {

inline constexpr int kWidth = 16;

struct Vec {
    __m512 v;
};

struct AllLanes {};
struct FirstLanes {
    int count;
};

FASTLLM_INLINE __mmask16 mask_of(FirstLanes lanes) {
    return static_cast<__mmask16>((1u << lanes.count) - 1u);
}

FASTLLM_INLINE Vec broadcast(float value) { return {_mm512_set1_ps(value)}; }

FASTLLM_INLINE Vec widen(__m256i half_words, const bfloat16*) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half_words), 16))};
}
FASTLLM_INLINE Vec widen(__m256i half_words, const float16*) {
    return {_mm512_cvtph_ps(half_words)};
}

// Any NaN becomes the one without payload, which rounding cannot carry over into infinity.
FASTLLM_INLINE __m512i bits_of_plain_nan(Vec value) {
    const __m512 quiet = _mm512_fixupimm_ps(value.v, value.v, _mm512_set1_epi32(0x33), 0);
    return _mm512_castps_si512(quiet);
}

// The bits whose upper half is the value rounded to bfloat16.
FASTLLM_INLINE __m512i rounded_to_upper_half(Vec value) {
    const __m512i bits = bits_of_plain_nan(value);
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __m512i biased = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    return _mm512_mask_add_epi32(biased, odd, biased, _mm512_set1_epi32(1));
}

FASTLLM_INLINE __m256i narrow(Vec value, const bfloat16*) {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_to_upper_half(value), 16));
}
FASTLLM_INLINE __m256i narrow(Vec value, const float16*) {
    return _mm512_cvtps_ph(value.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

FASTLLM_INLINE Vec load(const float* p, AllLanes) { return {_mm512_loadu_ps(p)}; }
FASTLLM_INLINE Vec load(const float* p, FirstLanes lanes) {
    return {_mm512_maskz_loadu_ps(mask_of(lanes), p)};
}
template <class T>
FASTLLM_INLINE Vec load(const T* p, AllLanes) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p);
}
template <class T>
FASTLLM_INLINE Vec load(const T* p, FirstLanes lanes) {
    return widen(_mm256_maskz_loadu_epi16(mask_of(lanes), p), p);
}

FASTLLM_INLINE void store(float* p, Vec v, AllLanes) { _mm512_storeu_ps(p, v.v); }
FASTLLM_INLINE void store(float* p, Vec v, FirstLanes lanes) {
    _mm512_mask_storeu_ps(p, mask_of(lanes), v.v);
}
template <class T>
FASTLLM_INLINE void store(T* p, Vec v, AllLanes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v, p));
}
template <class T>
FASTLLM_INLINE void store(T* p, Vec v, FirstLanes lanes) {
    _mm256_mask_storeu_epi16(p, mask_of(lanes), narrow(v, p));
}

// float32 whose bits are those of a bfloat16 times 2^16, plus an int16: halves, rounded to nearest
// with ties away from zero.
FASTLLM_INLINE Vec load_halves(const bfloat16* upper, const std::int16_t* lower, AllLanes lanes) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lower));
    const __m512i high = _mm512_castps_si512(load(upper, lanes).v);
    return {_mm512_castsi512_ps(_mm512_add_epi32(high, _mm512_cvtepi16_epi32(half)))};
}
FASTLLM_INLINE void store_halves(bfloat16* upper, std::int16_t* lower, Vec v, AllLanes) {
    const __m512i bits = bits_of_plain_nan(v);
    const __m512i high = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x8000)), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(upper), _mm512_cvtepi32_epi16(high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lower), _mm512_cvtepi32_epi16(bits));
}

// 2 * kWidth consecutive elements. Of bfloat16, `a` has those at even places and `b` those at odd
// ones, which takes one instruction each; of the other types, `a` has the first kWidth.
FASTLLM_INLINE void load_pair(const bfloat16* p, Vec& a, Vec& b) {
    const __m512i both = _mm512_loadu_si512(p);
    a.v = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    b.v = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(-65536)));
}
template <class T>
FASTLLM_INLINE void load_pair(const T* p, Vec& a, Vec& b) {
    a = load(p, AllLanes{});
    b = load(p + kWidth, AllLanes{});
}

FASTLLM_INLINE __m512i narrow_pair(Vec a, Vec b, const bfloat16*) {
    const __m512i even = _mm512_srli_epi32(rounded_to_upper_half(a), 16);
    return _mm512_mask_blend_epi16(0xaaaaaaaau, even, rounded_to_upper_half(b));
}
FASTLLM_INLINE __m512i narrow_pair(Vec a, Vec b, const float16* p) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(a, p)), narrow(b, p), 1);
}
FASTLLM_INLINE void store_pair(float* p, Vec a, Vec b) {
    store(p, a, AllLanes{});
    store(p + kWidth, b, AllLanes{});
}
template <class T>
FASTLLM_INLINE void store_pair(T* p, Vec a, Vec b) {
    _mm512_storeu_si512(p, narrow_pair(a, b, p));
}

// Stores that go around the cache need an address aligned to the register.
template <class T>
FASTLLM_INLINE bool can_stream(const T* p) {
    return reinterpret_cast<std::uintptr_t>(p) % 64 == 0;
}
FASTLLM_INLINE void store_streaming(float* p, Vec v, AllLanes) { _mm512_stream_ps(p, v.v); }
template <class T>
FASTLLM_INLINE void store_streaming(T* p, Vec v, AllLanes) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(v, p));
}
template <class T>
FASTLLM_INLINE void store_streaming(T* p, Vec v, FirstLanes lanes) {
    store(p, v, lanes);
}
FASTLLM_INLINE void store_pair_streaming(float* p, Vec a, Vec b) {
    _mm512_stream_ps(p, a.v);
    _mm512_stream_ps(p + kWidth, b.v);
}
template <class T>
FASTLLM_INLINE void store_pair_streaming(T* p, Vec a, Vec b) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), narrow_pair(a, b, p));
}
FASTLLM_INLINE void finish_streaming() { _mm_sfence(); }

FASTLLM_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
FASTLLM_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
FASTLLM_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
FASTLLM_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

FASTLLM_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
// The second operand where either is NaN.
FASTLLM_INLINE Vec minimum(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
FASTLLM_INLINE Vec maximum(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
FASTLLM_INLINE bool any_above(Vec a, Vec b) {
    return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) != 0;
}
FASTLLM_INLINE Vec round_to_integer(Vec a) { return {_mm512_roundscale_ps(a.v, 0)}; }

// 1 / a to 1 unit in the last place: an estimate to 2^-14 and one step of Newton's, which would
// make NaN of an infinite a. Division takes three times as long.
FASTLLM_INLINE Vec reciprocal(Vec a) {
    const __m512 estimate = _mm512_rcp14_ps(a.v);
    const __m512 error = _mm512_fnmadd_ps(a.v, estimate, _mm512_set1_ps(1.0f));
    const __mmask16 finite =
        _mm512_cmp_ps_mask(_mm512_abs_ps(a.v), _mm512_set1_ps(1e38f), _CMP_LT_OQ);
    return {_mm512_mask_fmadd_ps(estimate, finite, error, estimate)};
}

// t = n + r with n integral and |r| <= 1/2; an infinite t has n = t and r = 0.
FASTLLM_INLINE void split_at_integer(Vec t, Vec& n, Vec& r) {
    r.v = _mm512_reduce_ps(t.v, 8);
    n.v = _mm512_sub_ps(t.v, r.v);
}

// v * 2^n for integral n.
FASTLLM_INLINE Vec scale_by_power_of_two(Vec v, Vec n) { return {_mm512_scalef_ps(v.v, n.v)}; }

// From 2 * kWidth consecutive values, those at even and at odd places; and back.
FASTLLM_INLINE void split_pairs(Vec first, Vec second, Vec& even, Vec& odd) {
    const __m512i places =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i next = _mm512_add_epi32(places, _mm512_set1_epi32(1));
    even.v = _mm512_permutex2var_ps(first.v, places, second.v);
    odd.v = _mm512_permutex2var_ps(first.v, next, second.v);
}
FASTLLM_INLINE void join_pairs(Vec even, Vec odd, Vec& first, Vec& second) {
    const __m512i places =
        _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i later = _mm512_add_epi32(places, _mm512_set1_epi32(8));
    first.v = _mm512_permutex2var_ps(even.v, places, odd.v);
    second.v = _mm512_permutex2var_ps(even.v, later, odd.v);
}

FASTLLM_INLINE float largest(Vec a) {
    const __m256 upper = _mm512_extractf32x8_ps(a.v, 1);
    const __m256 m8 = _mm256_max_ps(_mm512_castps512_ps256(a.v), upper);
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(m8), _mm256_extractf128_ps(m8, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    m = _mm_max_ss(m, _mm_movehdup_ps(m));
    return _mm_cvtss_f32(m);
}

FASTLLM_INLINE Vec square_root(Vec a) { return {_mm512_sqrt_ps(a.v)}; }

FASTLLM_INLINE float first_lane(Vec a) { return _mm512_cvtss_f32(a.v); }

FASTLLM_INLINE float sum(Vec a) {
    const __m256 upper = _mm512_extractf32x8_ps(a.v, 1);
    const __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(a.v), upper);
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    s = _mm_add_ss(s, _mm_movehdup_ps(s));
    return _mm_cvtss_f32(s);
}

FASTLLM_INLINE float square_root(float value) {
    return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(value)));
}

}  // namespace fastllm::cpu::avx512
