// Eight floats in plain C++; compilers turn the loops into whatever vectors the target has.
#pragma once

#include <cmath>
#include <cstdint>

#include "fastllm/dtype.hpp"

namespace fastllm::cpu::portable {

inline constexpr int kWidth = 8;

struct Vec {
    float lane[kWidth];
};

// All kWidth lanes, or the first `count` of them; lanes that are not loaded are 0.
struct AllLanes {};
struct FirstLanes {
    int count;
};

template <class F>
FASTLLM_INLINE Vec map_lanes(const F& f) {
    Vec out;
    for (int i = 0; i < kWidth; ++i) out.lane[i] = f(i);
    return out;
}

FASTLLM_INLINE Vec broadcast(float value) {
    return map_lanes([&](int) { return value; });
}

template <class T>
FASTLLM_INLINE Vec load(const T* p, AllLanes) {
    return map_lanes([&](int i) { return to_float(p[i]); });
}

template <class T>
FASTLLM_INLINE Vec load(const T* p, FirstLanes lanes) {
    return map_lanes([&](int i) { return i < lanes.count ? to_float(p[i]) : 0.0f; });
}

template <class T>
FASTLLM_INLINE void store(T* p, Vec v, AllLanes) {
    for (int i = 0; i < kWidth; ++i) p[i] = from_float<T>(v.lane[i]);
}

template <class T>
FASTLLM_INLINE void store(T* p, Vec v, FirstLanes lanes) {
    for (int i = 0; i < lanes.count; ++i) p[i] = from_float<T>(v.lane[i]);
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
FASTLLM_INLINE void finish_streaming() {}

FASTLLM_INLINE Vec operator+(Vec a, Vec b) {
    return map_lanes([&](int i) { return a.lane[i] + b.lane[i]; });
}
FASTLLM_INLINE Vec operator-(Vec a, Vec b) {
    return map_lanes([&](int i) { return a.lane[i] - b.lane[i]; });
}
FASTLLM_INLINE Vec operator*(Vec a, Vec b) {
    return map_lanes([&](int i) { return a.lane[i] * b.lane[i]; });
}

// a * b + c; rounded once only where the target does that in one instruction.
FASTLLM_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
    return map_lanes([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}

FASTLLM_INLINE float sum(Vec v) {
    const float a = (v.lane[0] + v.lane[4]) + (v.lane[2] + v.lane[6]);
    const float b = (v.lane[1] + v.lane[5]) + (v.lane[3] + v.lane[7]);
    return a + b;
}

FASTLLM_INLINE float square_root(float value) { return std::sqrt(value); }

}  // namespace fastllm::cpu::portable
