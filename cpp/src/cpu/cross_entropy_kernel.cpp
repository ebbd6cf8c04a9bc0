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

template <class T>
float largest_of(const T* x, std::int64_t count, float at_least) {
    Max4 top(at_least);
    const std::int64_t whole = count / kWidth * kWidth;
    for_each_pair(whole, [&](std::int64_t c, int slot, auto lanes)
                             FASTLLM_LAMBDA { top.add(slot, load(x + c, lanes)); });
    float m = top.total();
    for (std::int64_t c = whole; c < count; ++c) {
        const float v = to_float(x[c]);
        m = v > m ? v : m;
    }
    return m;
}

// One pass over memory: each stretch is small enough to be still in the first-level cache when its
// sum is taken, and the sum so far is rescaled when the maximum grows.
template <class T>
MaxAndSum max_and_sum(const T* x, std::int64_t cols, MaxAndSum so_far) {
    constexpr std::int64_t kStretch = 4096;
    const float minus_infinity = detail::float_of(kMinusInfinity);
    float max = so_far.max;
    float sum = so_far.sum;
    for (std::int64_t begin = 0; begin < cols; begin += kStretch) {
        const std::int64_t count = cols - begin < kStretch ? cols - begin : kStretch;
        const float grown = largest_of(x + begin, count, max);
        // With nothing but -inf so far any finite reference gives exp(x - reference) = 0.
        const float reference = grown == minus_infinity ? 0.0f : grown;
        if (grown != max) sum *= scalar_exp(max - reference);
        max = grown;
        const Vec from = broadcast(reference);
        Sum4 sums;
        const std::int64_t whole = count / kWidth * kWidth;
        const T* next = x + begin + count;  // also at a row's end: rows adjoin
        for_each_pair(whole, [&](std::int64_t c, int slot, auto lanes) FASTLLM_LAMBDA {
            prefetch(next + c, lanes);
            sums.add(slot, exponential(load(x + begin + c, lanes) - from));
        });
        sum += sums.total();
        for (std::int64_t c = whole; c < count; ++c) {
            sum += scalar_exp(to_float(x[begin + c]) - reference);
        }
    }
    return {max, sum};
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
