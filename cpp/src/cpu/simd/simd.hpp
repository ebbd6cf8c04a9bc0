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

// Four partial sums, added in a fixed order.
struct Sum4 {
    Vec part[4] = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)};
    FASTLLM_INLINE float total() const { return sum((part[0] + part[1]) + (part[2] + part[3])); }
};

template <bool kStream, class T, class Lanes>
FASTLLM_INLINE void store_as(T* p, Vec v, Lanes lanes) {
    if constexpr (kStream) {
        store_streaming(p, v, lanes);
    } else {
        store(p, v, lanes);
    }
}

}  // namespace fastllm::cpu::FASTLLM_ISA
