// The vector type for the level that this file is being compiled for: FASTLLM_ISA is defined by the
// build to portable, avx2 or avx512, and is both a file name and a namespace.
//
// Kernel files are compiled once per level, so they must not instantiate anything that the linker
// may merge with another level's copy: no standard library templates, everything FASTLLM_INLINE or
// in the FASTLLM_ISA namespace.
#pragma once

#include <cstdint>

#include "fastllm/dtype.hpp"

#define FASTLLM_QUOTE_(text) #text
#define FASTLLM_QUOTE(text) FASTLLM_QUOTE_(text)
#include FASTLLM_QUOTE(FASTLLM_ISA.hpp)

#define FASTLLM_LAMBDA __attribute__((always_inline))

namespace fastllm::cpu::FASTLLM_ISA {

FASTLLM_INLINE Vec load_halves(const bfloat16* upper, const std::int16_t* lower, FirstLanes lanes) {
    bfloat16 high[kWidth] = {};
    std::int16_t low[kWidth] = {};
    for (int i = 0; i < lanes.count; ++i) {
        high[i] = upper[i];
        low[i] = lower[i];
    }
    return load_halves(high, low, AllLanes{});
}
FASTLLM_INLINE void store_halves(bfloat16* upper, std::int16_t* lower, Vec v, FirstLanes lanes) {
    bfloat16 high[kWidth];
    std::int16_t low[kWidth];
    store_halves(high, low, v, AllLanes{});
    for (int i = 0; i < lanes.count; ++i) {
        upper[i] = high[i];
        lower[i] = low[i];
    }
}

// Two vectors, of 2 * kWidth consecutive elements in the order of load_pair(). What is computed
// from several pairs element by element is right in any order, as long as all are of one element
// type.
struct VecPair {
    Vec a;
    Vec b;
    VecPair() = default;
    FASTLLM_INLINE VecPair(Vec of_a, Vec of_b) : a(of_a), b(of_b) {}
    FASTLLM_INLINE VecPair(Vec both) : a(both), b(both) {}  // NOLINT: a scalar for all lanes
};
struct PairLanes {};

template <class T>
FASTLLM_INLINE VecPair load(const T* p, PairLanes) {
    VecPair v;
    load_pair(p, v.a, v.b);
    return v;
}
template <class T>
FASTLLM_INLINE void store(T* p, VecPair v, PairLanes) {
    store_pair(p, v.a, v.b);
}
template <class T>
FASTLLM_INLINE void store_streaming(T* p, VecPair v, PairLanes) {
    store_pair_streaming(p, v.a, v.b);
}

FASTLLM_INLINE VecPair operator+(VecPair x, VecPair y) { return {x.a + y.a, x.b + y.b}; }
FASTLLM_INLINE VecPair operator-(VecPair x, VecPair y) { return {x.a - y.a, x.b - y.b}; }
FASTLLM_INLINE VecPair operator*(VecPair x, VecPair y) { return {x.a * y.a, x.b * y.b}; }
FASTLLM_INLINE VecPair operator/(VecPair x, VecPair y) { return {x.a / y.a, x.b / y.b}; }
FASTLLM_INLINE VecPair multiply_add(VecPair x, VecPair y, VecPair z) {
    return {multiply_add(x.a, y.a, z.a), multiply_add(x.b, y.b, z.b)};
}
FASTLLM_INLINE VecPair minimum(VecPair x, VecPair y) {
    return {minimum(x.a, y.a), minimum(x.b, y.b)};
}
FASTLLM_INLINE VecPair maximum(VecPair x, VecPair y) {
    return {maximum(x.a, y.a), maximum(x.b, y.b)};
}
FASTLLM_INLINE VecPair reciprocal(VecPair x) { return {reciprocal(x.a), reciprocal(x.b)}; }

// Fetches the lines of a pair of vectors into the cache. Where a line takes a hundred instructions,
// the processor's window is full before it comes to the next lines, and what should run beside each
// other, memory and arithmetic, runs one after the other (measured: half as fast). Passes that read
// memory fetch kAhead elements of the same tensor ahead; where a row is taken in several passes, a
// later pass, which reads the cache, fetches what the first one needs next. Past the end nothing
// happens.
template <class T>
FASTLLM_INLINE void prefetch(const T* p, PairLanes) {
    const char* line = reinterpret_cast<const char*>(p);
    __builtin_prefetch(line);
    if constexpr (2 * kWidth * sizeof(T) > 64) __builtin_prefetch(line + 64);
}
template <class T, class Lanes>
FASTLLM_INLINE void prefetch(const T*, Lanes) {}

template <class T>
inline constexpr std::int64_t kAhead = 2048 / static_cast<std::int64_t>(sizeof(T));

// Visits [0, count) in vectors: body(offset, slot, lanes). `slot` runs 0..3 over the body's copies
// in the unrolled loop, so that four sums can be kept apart; the last vector may be partial.
template <class Body>
FASTLLM_INLINE void for_each_vec(std::int64_t count, const Body& body) {
    std::int64_t c = 0;
    for (; c + 4 * kWidth <= count; c += 4 * kWidth) {
        body(c, 0, AllLanes{});
        body(c + kWidth, 1, AllLanes{});
        body(c + 2 * kWidth, 2, AllLanes{});
        body(c + 3 * kWidth, 3, AllLanes{});
    }
    for (; c + kWidth <= count; c += kWidth) body(c, 0, AllLanes{});
    if (c < count) body(c, 0, FirstLanes{static_cast<int>(count - c)});
}

// The same with pairs of vectors as long as there are enough elements: for bodies whose tensors are
// all of one element type. A pair takes the sums `slot` and `slot + 1`.
template <class Body>
FASTLLM_INLINE void for_each_pair(std::int64_t count, const Body& body) {
    std::int64_t c = 0;
    for (; c + 4 * kWidth <= count; c += 4 * kWidth) {
        body(c, 0, PairLanes{});
        body(c + 2 * kWidth, 2, PairLanes{});
    }
    if (c + 2 * kWidth <= count) {
        body(c, 0, PairLanes{});
        c += 2 * kWidth;
    }
    if (c + kWidth <= count) {
        body(c, 0, AllLanes{});
        c += kWidth;
    }
    if (c < count) body(c, 0, FirstLanes{static_cast<int>(count - c)});
}

// Four partial sums, added in a fixed order.
struct Sum4 {
    Vec part[4] = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)};
    FASTLLM_INLINE void add(int slot, Vec v) { part[slot] = part[slot] + v; }
    FASTLLM_INLINE void add(int slot, VecPair v) {
        add(slot, v.a);
        add(slot + 1, v.b);
    }
    FASTLLM_INLINE void add_product(int slot, Vec x, Vec y) {
        part[slot] = multiply_add(x, y, part[slot]);
    }
    FASTLLM_INLINE void add_product(int slot, VecPair x, VecPair y) {
        add_product(slot, x.a, y.a);
        add_product(slot + 1, x.b, y.b);
    }
    FASTLLM_INLINE float total() const { return sum((part[0] + part[1]) + (part[2] + part[3])); }
};

// Four partial maxima. NaN does not count.
struct Max4 {
    Vec part[4];
    FASTLLM_INLINE explicit Max4(float at_least) {
        for (Vec& p : part) p = broadcast(at_least);
    }
    FASTLLM_INLINE void add(int slot, Vec v) { part[slot] = maximum(v, part[slot]); }
    FASTLLM_INLINE void add(int slot, VecPair v) {
        add(slot, v.a);
        add(slot + 1, v.b);
    }
    FASTLLM_INLINE float total() const {
        return largest(maximum(maximum(part[0], part[1]), maximum(part[2], part[3])));
    }
};

template <bool kStream, class T, class V, class Lanes>
FASTLLM_INLINE void store_as(T* p, V v, Lanes lanes) {
    if constexpr (kStream) {
        store_streaming(p, v, lanes);
    } else {
        store(p, v, lanes);
    }
}

// Columns of which a thread keeps a row in its nearest caches, where a second pass finds what was
// written around them.
inline constexpr std::int64_t kRowBuffer = 16384;

// Calls body(T{}) with the element type that `dtype` names.
template <class Body>
FASTLLM_INLINE void with_element_type(DType dtype, const Body& body) {
    switch (dtype) {
        case DType::kFloat32:
            return body(float{});
        case DType::kBFloat16:
            return body(bfloat16{});
        case DType::kFloat16:
            return body(float16{});
    }
}

}  // namespace fastllm::cpu::FASTLLM_ISA
