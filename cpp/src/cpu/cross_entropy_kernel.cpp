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
    Vec top[4] = {broadcast(at_least), broadcast(at_least), broadcast(at_least),
                  broadcast(at_least)};
    const std::int64_t whole = count / kWidth * kWidth;
    for_each_vec(whole, [&](std::int64_t c, int slot, auto lanes) FASTLLM_LAMBDA {
        top[slot] = maximum(load(x + c, lanes), top[slot]);  // NaN does not count here
    });
    float m = largest(maximum(maximum(top[0], top[1]), maximum(top[2], top[3])));
    for (std::int64_t c = whole; c < count; ++c) {
        const float v = to_float(x[c]);
        m = v > m ? v : m;
    }
    return m;
}

// One pass over memory: each stretch is small enough to be still in the first-level cache when its
// sum is taken, and the sum so far is rescaled when the maximum grows.
template <class T>
MaxAndSum max_and_sum(const T* x, std::int64_t cols) {
    constexpr std::int64_t kStretch = 4096;
    const float minus_infinity = detail::float_of(kMinusInfinity);
    float max = minus_infinity;
    float sum = 0.0f;
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
        for_each_vec(whole, [&](std::int64_t c, int slot, auto lanes) FASTLLM_LAMBDA {
            sums.part[slot] = sums.part[slot] + exponential(load(x + begin + c, lanes) - from);
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
        const MaxAndSum found = max_and_sum(x, a.cols);
        a.max[row] = found.max;
        a.sum[row] = found.sum;
        const std::int64_t label = a.labels[row];
        const std::int64_t column = label - a.first;
        const bool here = label != a.ignore && column >= 0 && column < a.cols;
        a.target[row] = here ? to_float(x[column]) : 0.0f;
    }
}

template <class T, bool kStream>
void gradient_row(const T* x, float lse, float dloss, T* dx, std::int64_t cols) {
    const Vec from = broadcast(lse);
    const Vec scale = broadcast(dloss);
    for_each_vec(cols, [&](std::int64_t c, int, auto lanes) FASTLLM_LAMBDA {
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
    switch (a.dtype) {
        case DType::kFloat32:
            return fwd_rows<float>(a, begin, end);
        case DType::kBFloat16:
            return fwd_rows<bfloat16>(a, begin, end);
        case DType::kFloat16:
            return fwd_rows<float16>(a, begin, end);
    }
}

void bwd_any(const CrossEntropyBwd& a, std::int64_t begin, std::int64_t end, bool stream) {
    switch (a.dtype) {
        case DType::kFloat32:
            return bwd_rows<float>(a, begin, end, stream);
        case DType::kBFloat16:
            return bwd_rows<bfloat16>(a, begin, end, stream);
        case DType::kFloat16:
            return bwd_rows<float16>(a, begin, end, stream);
    }
}

}  // namespace

const CrossEntropyKernels cross_entropy = {fwd_any, bwd_any};

}  // namespace fastllm::cpu::FASTLLM_ISA
