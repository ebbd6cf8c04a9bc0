// Compiled once per vector level; see simd/simd.hpp.
#include "cross_entropy_kernel.hpp"

#include "simd/exp.hpp"
#include "simd/simd.hpp"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

constexpr std::uint32_t kMinusInfinity = 0xff800000u;

FASTLLM_INLINE float scalar_exp(float x) { return first_lane(exponential(broadcast(x))); }

struct MaxAndSum {
    float max;
    float sum;
};

// max and sum_i(exp(x_i - max)) of what was added, in one pass: the sums are taken from a reference
// that may be up to kSlack below the maximum, so that they are scaled anew a few times a row at
// most. exp(kSlack) times any number of columns is far from float's largest.
class RunningSum {
  public:
    FASTLLM_INLINE explicit RunningSum(float at_least) : top_(broadcast(at_least)) {}

    // kPairs pairs of vectors.
    template <int kPairs, class T>
    FASTLLM_INLINE void add(const T* x) {
        for (int i = 0; i < kPairs; ++i) {
            const T* p = x + i * 2 * kWidth;
            prefetch(p + 2 * kAhead<T>, PairLanes{});
            const VecPair v = load(p, PairLanes{});
            top_ = maximum(v.a, maximum(v.b, top_));
        }
        raise_reference();
        for (int i = 0; i < kPairs; ++i) {
            const VecPair v = load(x + i * 2 * kWidth, PairLanes{});
            sums_.add(i % 2 * 2, exponential(v - VecPair(reference_)));
        }
    }

    // One vector.
    template <class T>
    FASTLLM_INLINE void add(const T* x) {
        const Vec v = load(x, AllLanes{});
        top_ = maximum(v, top_);
        raise_reference();
        sums_.add(0, exponential(v - reference_));
    }

    // What was added before this object had its max and sum in `before`.
    FASTLLM_INLINE MaxAndSum total(MaxAndSum before) const {
        const float max = largest(top_);
        const float sum = sums_.total();
        if (max == detail::float_of(kMinusInfinity)) return {max, before.sum + sum};  // 0, or NaN
        const float reference = first_lane(reference_);
        return {max, before.sum * scalar_exp(before.max - max) + sum * scalar_exp(reference - max)};
    }

  private:
    static constexpr float kSlack = 40.0f;

    FASTLLM_INLINE void raise_reference() {
        if (!any_above(top_, reference_ + broadcast(kSlack))) return;
        const Vec grown = broadcast(largest(top_));
        const Vec by = exponential(reference_ - grown);
        for (Vec& part : sums_.part) part = part * by;
        reference_ = grown;
    }

    Vec top_;
    // The least finite number to begin with: any other is above it, and exp(-inf - it) is 0.
    Vec reference_ = broadcast(detail::float_of(0xff7fffffu));
    Sum4 sums_;
};

// The two halves of the row are read side by side, which keeps more of memory busy.
template <class T>
MaxAndSum max_and_sum(const T* x, std::int64_t cols, MaxAndSum before) {
    constexpr int kPairs = 4;
    constexpr std::int64_t kGroup = kPairs * 2 * kWidth;
    RunningSum running(before.max);
    const std::int64_t half = cols / (2 * kGroup) * kGroup;
    for (std::int64_t c = 0; c < half; c += kGroup) {
        running.add<kPairs>(x + c);
        running.add<kPairs>(x + half + c);
    }
    std::int64_t c = 2 * half;
    for (; c + kWidth <= cols; c += kWidth) running.add(x + c);
    if (c < cols) {
        T rest[kWidth];
        for (T& v : rest) v = c < cols ? x[c++] : from_float<T>(detail::float_of(kMinusInfinity));
        running.add(rest);
    }
    return running.total(before);
}

template <class T>
void fwd_rows(const CrossEntropyFwd& a, std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(a.logits) + row * a.cols;
        const MaxAndSum none{detail::float_of(kMinusInfinity), 0.0f};
        const MaxAndSum found =
            max_and_sum(x, a.cols, a.merge ? MaxAndSum{a.max[row], a.sum[row]} : none);
        a.max[row] = found.max;
        a.sum[row] = found.sum;
        const std::int64_t label = a.labels[row];
        const std::int64_t column = label - a.first;
        const bool here = label != a.ignore && column >= 0 && column < a.cols;
        const float before = a.merge ? a.target[row] : 0.0f;
        a.target[row] = here ? to_float(x[column]) : before;
    }
}

template <class T>
void loss_rows(const CrossEntropyLoss& a, std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(a.logits) + row * a.cols;
        const MaxAndSum found = max_and_sum(x, a.cols, {detail::float_of(kMinusInfinity), 0.0f});
        const float lse = found.max + __builtin_logf(found.sum);
        const std::int64_t label = a.labels[row];
        float loss = detail::float_of(0x7fc00000u);
        if (label >= 0 && label < a.cols) loss = lse - to_float(x[label]);
        a.lse[row] = lse;
        a.loss[row] = label == a.ignore ? 0.0f : loss;
    }
}

template <class T, bool kStream>
void gradient_row(const T* x, float lse, float dloss, T* dx, std::int64_t cols) {
    const Vec from = broadcast(lse);
    const Vec scale = broadcast(dloss);
    for_each_pair(cols, [&](std::int64_t c, int, auto lanes) FASTLLM_LAMBDA {
        prefetch(x + c + kAhead<T>, lanes);
        store_as<kStream>(dx + c, exponential(load(x + c, lanes) - from) * scale, lanes);
    });
}

template <class T>
void bwd_rows(const CrossEntropyBwd& a, std::int64_t begin, std::int64_t end, bool stream) {
    for (std::int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(a.logits) + row * a.cols;
        T* dx = static_cast<T*>(a.dlogits) + row * a.cols;
        const std::int64_t label = a.labels[row];
        if (label == a.ignore) {
            for (std::int64_t c = 0; c < a.cols; ++c) dx[c] = T{};
            continue;
        }
        const std::int64_t column = label - a.first;
        const bool here = column >= 0 && column < a.cols;
        const float at_label = here ? to_float(x[column]) : 0.0f;  // before dx may overwrite it
        if (stream && can_stream(dx)) {
            gradient_row<T, true>(x, a.lse[row], a.dloss[row], dx, a.cols);
            if (here) finish_streaming();
        } else {
            gradient_row<T, false>(x, a.lse[row], a.dloss[row], dx, a.cols);
        }
        if (here) {
            const float p = scalar_exp(at_label - a.lse[row]);
            dx[column] = from_float<T>((p - 1.0f) * a.dloss[row]);
        }
    }
    if (stream) finish_streaming();
}

void fwd_any(const CrossEntropyFwd& a, std::int64_t begin, std::int64_t end) {
    with_element_type(a.dtype,
                      [&](auto zero) FASTLLM_LAMBDA { fwd_rows<decltype(zero)>(a, begin, end); });
}

void loss_any(const CrossEntropyLoss& a, std::int64_t begin, std::int64_t end) {
    with_element_type(a.dtype,
                      [&](auto zero) FASTLLM_LAMBDA { loss_rows<decltype(zero)>(a, begin, end); });
}

void bwd_any(const CrossEntropyBwd& a, std::int64_t begin, std::int64_t end, bool stream) {
    with_element_type(a.dtype, [&](auto zero) FASTLLM_LAMBDA {
        bwd_rows<decltype(zero)>(a, begin, end, stream);
    });
}

}  // namespace

const CrossEntropyKernels cross_entropy = {fwd_any, loss_any, bwd_any};

}  // namespace fastllm::cpu::FASTLLM_ISA
