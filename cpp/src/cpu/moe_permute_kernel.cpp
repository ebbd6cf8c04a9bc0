// Compiled once per vector level; see simd/simd.hpp.
#include "moe_permute_kernel.hpp"

#include "simd/simd.hpp"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

FASTLLM_INLINE bool taken(std::int64_t slot, std::int64_t places) {
    return slot >= 0 && slot < places;
}

template <class T>
void permute_tokens(const MoePermute& a, std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
        const T* x = static_cast<const T*>(a.x) + t * a.cols;
        for (std::int64_t k = 0; k < a.choices; ++k) {
            const std::int64_t slot = a.slots[t * a.choices + k];
            if (!taken(slot, a.places)) continue;
            T* y = static_cast<T*>(a.y) + slot * a.cols;
            __builtin_memcpy(y, x, static_cast<std::size_t>(a.cols) * sizeof(T));
        }
    }
}

// The choices are added in the row's stretch of columns that the first-level cache holds, in float.
template <class T>
void combine_tokens(const MoeCombine& a, std::int64_t begin, std::int64_t end) {
    constexpr std::int64_t kStretch = 2048;
    alignas(64) float sums[kStretch];
    for (std::int64_t t = begin; t < end; ++t) {
        T* out = static_cast<T*>(a.out) + t * a.cols;
        for (std::int64_t c = 0; c < a.cols; c += kStretch) {
            const std::int64_t count = a.cols - c < kStretch ? a.cols - c : kStretch;
            for (std::int64_t i = 0; i < count; ++i) sums[i] = 0.0f;
            for (std::int64_t k = 0; k < a.choices; ++k) {
                const std::int64_t slot = a.slots[t * a.choices + k];
                if (!taken(slot, a.places)) continue;
                const T* y = static_cast<const T*>(a.y) + slot * a.cols + c;
                const Vec w = broadcast(a.weights != nullptr ? a.weights[t * a.choices + k] : 1.0f);
                for_each_pair(count, [&](std::int64_t i, int, auto lanes) FASTLLM_LAMBDA {
                    store(sums + i, multiply_add(load(y + i, lanes), w, load(sums + i, lanes)),
                          lanes);
                });
            }
            for_each_pair(count, [&](std::int64_t i, int, auto lanes) FASTLLM_LAMBDA {
                store(out + c + i, load(sums + i, lanes), lanes);
            });
        }
    }
}

// Writes dy = w * dout; returns sum(dout * y).
template <class T>
float combine_gradient(const T* dout, const T* y, float weight, T* dy, std::int64_t cols) {
    const Vec w = broadcast(weight);
    Sum4 dots;
    for_each_pair(cols, [&](std::int64_t c, int slot, auto lanes) FASTLLM_LAMBDA {
        const auto d = load(dout + c, lanes);
        dots.add_product(slot, d, load(y + c, lanes));
        store(dy + c, d * w, lanes);
    });
    return dots.total();
}

template <class T>
void combine_bwd_tokens(const MoeCombineBwd& a, std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
        const T* dout = static_cast<const T*>(a.dout) + t * a.cols;
        for (std::int64_t k = 0; k < a.choices; ++k) {
            const std::int64_t i = t * a.choices + k;
            const std::int64_t slot = a.slots[i];
            a.dweights[i] = 0.0f;
            if (!taken(slot, a.places)) continue;
            a.dweights[i] =
                combine_gradient(dout, static_cast<const T*>(a.y) + slot * a.cols, a.weights[i],
                                 static_cast<T*>(a.dy) + slot * a.cols, a.cols);
        }
    }
}

void permute_any(const MoePermute& a, std::int64_t begin, std::int64_t end) {
    with_element_type(
        a.dtype, [&](auto zero) FASTLLM_LAMBDA { permute_tokens<decltype(zero)>(a, begin, end); });
}

void combine_any(const MoeCombine& a, std::int64_t begin, std::int64_t end) {
    with_element_type(
        a.dtype, [&](auto zero) FASTLLM_LAMBDA { combine_tokens<decltype(zero)>(a, begin, end); });
}

void combine_bwd_any(const MoeCombineBwd& a, std::int64_t begin, std::int64_t end) {
    with_element_type(a.dtype, [&](auto zero) FASTLLM_LAMBDA {
        combine_bwd_tokens<decltype(zero)>(a, begin, end);
    });
}

}  // namespace

const MoePermuteKernels moe_permute = {permute_any, combine_any, combine_bwd_any};

}  // namespace fastllm::cpu::FASTLLM_ISA
