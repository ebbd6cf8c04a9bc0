// Eight floats in an AVX2 register. Included only where the file is compiled for x86-64-v3.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "fastllm/dtype.hpp"

namespace fastllm::cpu::avx2 {

inline constexpr int kWidth = 8;

struct Vec {
    __m256 v;
};

struct AllLanes {};
struct FirstLanes {
    int count;
};

FASTLLM_INLINE Vec broadcast(float value) { return {_mm256_set1_ps(value)}; }

FASTLLM_INLINE Vec widen(__m128i half_words, const bfloat16*) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half_words), 16))};
}
FASTLLM_INLINE Vec widen(__m128i half_words, const float16*) {
    return {_mm256_cvtph_ps(half_words)};
}

// The bits whose upper half is the value rounded to bfloat16.
FASTLLM_INLINE __m256i rounded_to_upper_half(Vec value) {
    const __m256i bits = _mm256_castps_si256(value.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256 is_nan = _mm256_cmp_ps(value.v, value.v, _CMP_UNORD_Q);
    const __m256i quiet = _mm256_set1_epi32(0x7fc00000);
    return _mm256_blendv_epi8(_mm256_add_epi32(bits, bias), quiet, _mm256_castps_si256(is_nan));
}

FASTLLM_INLINE __m128i narrow(Vec value, const bfloat16*) {
    const __m256i words = _mm256_srli_epi32(rounded_to_upper_half(value), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
FASTLLM_INLINE __m128i narrow(Vec value, const float16*) {
    return _mm256_cvtps_ph(value.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

FASTLLM_INLINE __m256i mask_of(FirstLanes lanes) {
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(lanes.count), index);
}

FASTLLM_INLINE Vec load(const float* p, AllLanes) { return {_mm256_loadu_ps(p)}; }
FASTLLM_INLINE Vec load(const float* p, FirstLanes lanes) {
    return {_mm256_maskload_ps(p, mask_of(lanes))};
}
template <class T>
FASTLLM_INLINE Vec load(const T* p, AllLanes) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), p);
}
template <class T>
FASTLLM_INLINE Vec load(const T* p, FirstLanes lanes) {
    alignas(16) T copy[kWidth] = {};
    for (int i = 0; i < lanes.count; ++i) copy[i] = p[i];
    return widen(_mm_load_si128(reinterpret_cast<const __m128i*>(copy)), p);
}

FASTLLM_INLINE void store(float* p, Vec v, AllLanes) { _mm256_storeu_ps(p, v.v); }
FASTLLM_INLINE void store(float* p, Vec v, FirstLanes lanes) {
    _mm256_maskstore_ps(p, mask_of(lanes), v.v);
}
template <class T>
FASTLLM_INLINE void store(T* p, Vec v, AllLanes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v, p));
}
template <class T>
FASTLLM_INLINE void store(T* p, Vec v, FirstLanes lanes) {
    alignas(16) T copy[kWidth];
    _mm_store_si128(reinterpret_cast<__m128i*>(copy), narrow(v, p));
    for (int i = 0; i < lanes.count; ++i) p[i] = copy[i];
}

// float32 whose bits are those of a bfloat16 times 2^16, plus an int16: halves, rounded to nearest
// with ties away from zero. Any NaN becomes the one without payload.
FASTLLM_INLINE Vec load_halves(const bfloat16* upper, const std::int16_t* lower, AllLanes lanes) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(lower));
    const __m256i high = _mm256_castps_si256(load(upper, lanes).v);
    return {_mm256_castsi256_ps(_mm256_add_epi32(high, _mm256_cvtepi16_epi32(half)))};
}
FASTLLM_INLINE void store_halves(bfloat16* upper, std::int16_t* lower, Vec v, AllLanes) {
    const __m256 is_nan = _mm256_cmp_ps(v.v, v.v, _CMP_UNORD_Q);
    const __m256 quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    const __m256i bits = _mm256_castps_si256(_mm256_blendv_ps(v.v, quiet, is_nan));
    const __m256i high = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x8000)), 16);
    const __m256i low = _mm256_and_si256(bits, _mm256_set1_epi32(0xffff));
    // Per 128 bits: four upper halves, then four lower ones.
    const __m256i packed = _mm256_packus_epi32(high, low);
    const __m256i both = _mm256_permute4x64_epi64(packed, _MM_SHUFFLE(3, 1, 2, 0));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(upper), _mm256_castsi256_si128(both));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(lower), _mm256_extracti128_si256(both, 1));
}

// 2 * kWidth consecutive elements. Of bfloat16, `a` has those at even places and `b` those at odd
// ones, which takes one instruction each; of the other types, `a` has the first kWidth.
FASTLLM_INLINE void load_pair(const bfloat16* p, Vec& a, Vec& b) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    a.v = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    b.v = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(-65536)));
}
template <class T>
FASTLLM_INLINE void load_pair(const T* p, Vec& a, Vec& b) {
    a = load(p, AllLanes{});
    b = load(p + kWidth, AllLanes{});
}

FASTLLM_INLINE __m256i narrow_pair(Vec a, Vec b, const bfloat16*) {
    const __m256i even = _mm256_srli_epi32(rounded_to_upper_half(a), 16);
    return _mm256_blend_epi16(even, rounded_to_upper_half(b), 0xaa);
}
FASTLLM_INLINE __m256i narrow_pair(Vec a, Vec b, const float16* p) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(narrow(a, p)), narrow(b, p), 1);
}
FASTLLM_INLINE void store_pair(float* p, Vec a, Vec b) {
    store(p, a, AllLanes{});
    store(p + kWidth, b, AllLanes{});
}
template <class T>
FASTLLM_INLINE void store_pair(T* p, Vec a, Vec b) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_pair(a, b, p));
}

// Stores that go around the cache need an address aligned to the register.
template <class T>
FASTLLM_INLINE bool can_stream(const T* p) {
    return reinterpret_cast<std::uintptr_t>(p) % 32 == 0;
}
FASTLLM_INLINE void store_streaming(float* p, Vec v, AllLanes) { _mm256_stream_ps(p, v.v); }
template <class T>
FASTLLM_INLINE void store_streaming(T* p, Vec v, AllLanes) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(v, p));
}
template <class T>
FASTLLM_INLINE void store_streaming(T* p, Vec v, FirstLanes lanes) {
    store(p, v, lanes);
}
FASTLLM_INLINE void store_pair_streaming(float* p, Vec a, Vec b) {
    _mm256_stream_ps(p, a.v);
    _mm256_stream_ps(p + kWidth, b.v);
}
template <class T>
FASTLLM_INLINE void store_pair_streaming(T* p, Vec a, Vec b) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_pair(a, b, p));
}
FASTLLM_INLINE void finish_streaming() { _mm_sfence(); }

FASTLLM_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
FASTLLM_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
FASTLLM_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
FASTLLM_INLINE Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

FASTLLM_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
// The second operand where either is NaN.
FASTLLM_INLINE Vec minimum(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
FASTLLM_INLINE Vec maximum(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
FASTLLM_INLINE bool any_above(Vec a, Vec b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)) != 0;
}
FASTLLM_INLINE Vec round_to_integer(Vec a) {
    return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
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
    const __m256i whole = _mm256_cvtps_epi32(n.v);
    const __m256i half = _mm256_srai_epi32(whole, 1);
    const auto power_of_two = [](__m256i e) __attribute__((always_inline)) {
        const __m256i biased = _mm256_add_epi32(e, _mm256_set1_epi32(127));
        return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
    };
    const __m256 first = _mm256_mul_ps(v.v, power_of_two(half));
    return {_mm256_mul_ps(first, power_of_two(_mm256_sub_epi32(whole, half)))};
}

// From 2 * kWidth consecutive values, those at even and at odd places; and back.
FASTLLM_INLINE void split_pairs(Vec first, Vec second, Vec& even, Vec& odd) {
    const __m256 e = _mm256_shuffle_ps(first.v, second.v, _MM_SHUFFLE(2, 0, 2, 0));
    const __m256 o = _mm256_shuffle_ps(first.v, second.v, _MM_SHUFFLE(3, 1, 3, 1));
    even.v = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(e), _MM_SHUFFLE(3, 1, 2, 0)));
    odd.v = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(o), _MM_SHUFFLE(3, 1, 2, 0)));
}
FASTLLM_INLINE void join_pairs(Vec even, Vec odd, Vec& first, Vec& second) {
    const __m256 low = _mm256_unpacklo_ps(even.v, odd.v);
    const __m256 high = _mm256_unpackhi_ps(even.v, odd.v);
    first.v = _mm256_permute2f128_ps(low, high, 0x20);
    second.v = _mm256_permute2f128_ps(low, high, 0x31);
}

FASTLLM_INLINE float largest(Vec a) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    m = _mm_max_ss(m, _mm_movehdup_ps(m));
    return _mm_cvtss_f32(m);
}

FASTLLM_INLINE Vec square_root(Vec a) { return {_mm256_sqrt_ps(a.v)}; }

FASTLLM_INLINE float first_lane(Vec a) { return _mm256_cvtss_f32(a.v); }

FASTLLM_INLINE float sum(Vec a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    s = _mm_add_ss(s, _mm_movehdup_ps(s));
    return _mm_cvtss_f32(s);
}

FASTLLM_INLINE float square_root(float value) {
    return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(value)));
}

}  // namespace fastllm::cpu::avx2
