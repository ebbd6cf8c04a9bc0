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

// A copy of a token, and what it counts.
template <class T>
struct Copy {
    const T* y;
    Vec weight;
};

// Copies whose rows are read side by side. Where a token has more, the sums so far are kept in a
// buffer that stays in the first-level cache.
constexpr std::int64_t kCopies = 8;
constexpr std::int64_t kStretch = 2048;

// Those of token t's choices [begin, begin + kCopies) that were not dropped; returns how many.
template <class T>
int copies_of(const MoeCombine& a, std::int64_t t, std::int64_t begin, Copy<T>* copies) {
    int found = 0;
    for (std::int64_t k = begin; k < a.choices && k < begin + kCopies; ++k) {
        const std::int64_t slot = a.slots[t * a.choices + k];
        if (!taken(slot, a.places)) continue;
        const float w = a.weights != nullptr ? a.weights[t * a.choices + k] : 1.0f;
        copies[found++] = {static_cast<const T*>(a.y) + slot * a.cols, broadcast(w)};
    }
    return found;
}

// out = sums + the copies, in float; sums begin at 0 where there are none yet.
template <class T, bool kStream, class Out>
void add_copies(const Copy<T>* copies, int count, std::int64_t column, const float* sums, Out* out,
                std::int64_t cols) {
    for_each_pair(cols, [&](std::int64_t c, int, auto lanes) FASTLLM_LAMBDA {
        decltype(load(copies->y, lanes)) total = broadcast(0.0f);
        if (sums != nullptr) total = load(sums + c, lanes);
        for (int i = 0; i < count; ++i) {
            const T* y = copies[i].y + column + c;
            prefetch(y + kAhead<T>, lanes);
            total = multiply_add(load(y, lanes), copies[i].weight, total);
        }
        store_as<kStream>(out + c, total, lanes);
    });
}

template <class T, bool kStream>
void combine_token(const MoeCombine& a, std::int64_t t, T* out) {
    alignas(64) float buffer[kStretch];
    Copy<T> copies[kCopies];
    for (std::int64_t c = 0; c < a.cols; c += kStretch) {
        const std::int64_t width = a.cols - c < kStretch ? a.cols - c : kStretch;
        const float* sums = nullptr;
        std::int64_t k = 0;
        for (; k + kCopies < a.choices; k += kCopies) {
            const int count = copies_of(a, t, k, copies);
            add_copies<T, false>(copies, count, c, sums, buffer, width);
            sums = buffer;
        }
        const int count = copies_of(a, t, k, copies);
        add_copies<T, kStream>(copies, count, c, sums, out + c, width);
    }
}

template <class T>
void combine_tokens(const MoeCombine& a, std::int64_t begin, std::int64_t end, bool stream) {
    for (std::int64_t t = begin; t < end; ++t) {
        T* out = static_cast<T*>(a.out) + t * a.cols;
        auto* combine =
            stream && can_stream(out) ? &combine_token<T, true> : &combine_token<T, false>;
        combine(a, t, out);
    }
    if (stream) finish_streaming();
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

void combine_any(const MoeCombine& a, std::int64_t begin, std::int64_t end, bool stream) {
    with_element_type(a.dtype, [&](auto zero) FASTLLM_LAMBDA {
        combine_tokens<decltype(zero)>(a, begin, end, stream);
    });
}

void combine_bwd_any(const MoeCombineBwd& a, std::int64_t begin, std::int64_t end) {
    with_element_type(a.dtype, [&](auto zero) FASTLLM_LAMBDA {
        combine_bwd_tokens<decltype(zero)>(a, begin, end);
    });
}

}  // namespace

const MoePermuteKernels moe_permute = {permute_any, combine_any, combine_bwd_any};

}  // namespace fastllm::cpu::FASTLLM_ISA
