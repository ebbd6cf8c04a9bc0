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

FASTLLM_INLINE Vec operator/(Vec a, Vec b) {
    return map_lanes([&](int i) { return a.lane[i] / b.lane[i]; });
}

// The second operand where either is NaN, as the x86 instructions do.
FASTLLM_INLINE Vec minimum(Vec a, Vec b) {
    return map_lanes([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
FASTLLM_INLINE Vec maximum(Vec a, Vec b) {
    return map_lanes([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}

// To the nearest integer, for |value| < 2^22.
FASTLLM_INLINE Vec round_to_integer(Vec v) {
    constexpr float kShift = 12582912.0f;  // 1.5 * 2^23, where the unit in the last place is 1
    return map_lanes([&](int i) { return (v.lane[i] + kShift) - kShift; });
}

// v * 2^n for integral n from -200 to 200, in two steps because 2^n may be out of range by itself.
FASTLLM_INLINE Vec scale_by_power_of_two(Vec v, Vec n) {
    return map_lanes([&](int i) {
        const float power = n.lane[i] == n.lane[i] ? n.lane[i] : 0.0f;  // NaN has no integer
        const int whole = static_cast<int>(power);
        const int half = whole >> 1;
        const auto power_of_two = [](int e) {
            return detail::float_of(static_cast<std::uint32_t>(e + 127) << 23);
        };
        return v.lane[i] * power_of_two(half) * power_of_two(whole - half);
    });
}

// From 2 * kWidth consecutive values, those at even and at odd places; and back.
FASTLLM_INLINE void split_pairs(Vec first, Vec second, Vec& even, Vec& odd) {
    for (int i = 0; i < kWidth / 2; ++i) {
        even.lane[i] = first.lane[2 * i];
        odd.lane[i] = first.lane[2 * i + 1];
        even.lane[kWidth / 2 + i] = second.lane[2 * i];
        odd.lane[kWidth / 2 + i] = second.lane[2 * i + 1];
    }
}
FASTLLM_INLINE void join_pairs(Vec even, Vec odd, Vec& first, Vec& second) {
    for (int i = 0; i < kWidth / 2; ++i) {
        first.lane[2 * i] = even.lane[i];
        first.lane[2 * i + 1] = odd.lane[i];
        second.lane[2 * i] = even.lane[kWidth / 2 + i];
        second.lane[2 * i + 1] = odd.lane[kWidth / 2 + i];
    }
}

FASTLLM_INLINE float largest(Vec v) {
    float m = v.lane[0];
    for (int i = 1; i < kWidth; ++i) m = v.lane[i] > m ? v.lane[i] : m;
    return m;
}

FASTLLM_INLINE Vec square_root(Vec v) {
    return map_lanes([&](int i) { return std::sqrt(v.lane[i]); });
}

FASTLLM_INLINE float first_lane(Vec v) { return v.lane[0]; }

FASTLLM_INLINE float sum(Vec v) {
    const float a = (v.lane[0] + v.lane[4]) + (v.lane[2] + v.lane[6]);
    const float b = (v.lane[1] + v.lane[5]) + (v.lane[3] + v.lane[7]);
    return a + b;
}

FASTLLM_INLINE float square_root(float value) { return std::sqrt(value); }

}  // namespace fastllm::cpu::portable
