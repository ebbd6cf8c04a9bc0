// Compiled once per vector level; see simd/simd.hpp.
#include "rope_kernel.hpp"

#include "simd/simd.hpp"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

template <bool kStream, class T>
void turn_halves(const T* x, T* y, const float* cos, const float* sin, Vec sign,
                 std::int64_t pairs) {
    for_each_vec(pairs, [&](std::int64_t i, int, auto lanes) FASTLLM_LAMBDA {
        const Vec c = load(cos + i, lanes);
        const Vec s = load(sin + i, lanes) * sign;
        const Vec a = load(x + i, lanes);
        const Vec b = load(x + pairs + i, lanes);
        store_as<kStream>(y + i, a * c - b * s, lanes);
        store_as<kStream>(y + pairs + i, multiply_add(b, c, a * s), lanes);
    });
}

template <bool kStream, class T>
void turn_neighbours(const T* x, T* y, const float* cos, const float* sin, float sign,
                     std::int64_t pairs) {
    std::int64_t i = 0;
    for (; i + kWidth <= pairs; i += kWidth) {
        const Vec c = load(cos + i, AllLanes{});
        const Vec s = load(sin + i, AllLanes{}) * broadcast(sign);
        Vec a, b;
        split_pairs(load(x + 2 * i, AllLanes{}), load(x + 2 * i + kWidth, AllLanes{}), a, b);
        Vec first, second;
        join_pairs(a * c - b * s, multiply_add(b, c, a * s), first, second);
        store_as<kStream>(y + 2 * i, first, AllLanes{});
        store_as<kStream>(y + 2 * i + kWidth, second, AllLanes{});
    }
    for (; i < pairs; ++i) {
        const float a = to_float(x[2 * i]);
        const float b = to_float(x[2 * i + 1]);
        y[2 * i] = from_float<T>(a * cos[i] - b * (sin[i] * sign));
        y[2 * i + 1] = from_float<T>(b * cos[i] + a * (sin[i] * sign));
    }
}

template <bool kStream, class T>
void turn(bool interleaved, const T* x, T* y, const float* cos, const float* sin, float sign,
          std::int64_t pairs) {
    if (interleaved) {
        turn_neighbours<kStream>(x, y, cos, sin, sign, pairs);
    } else {
        turn_halves<kStream>(x, y, cos, sin, broadcast(sign), pairs);
    }
}

template <class T>
void run_tokens(const Rope& r, std::int64_t begin, std::int64_t end, bool stream) {
    const std::int64_t pairs = r.rotary_dim / 2;
    const float sign = r.inverse ? -1.0f : 1.0f;
    for (std::int64_t t = begin; t < end; ++t) {
        const std::int64_t batch = t / r.tokens;
        const std::int64_t token = t % r.tokens;
        const std::int64_t row = r.positions != nullptr ? r.positions[t] : token;
        const bool known = row >= 0 && row < r.table_rows;
        const float* cos = r.cos + (known ? row : 0) * pairs;
        const float* sin = r.sin + (known ? row : 0) * pairs;
        for (std::int64_t head = 0; head < r.heads; ++head) {
            const T* x = static_cast<const T*>(r.x) + batch * r.x_strides.batch +
                         token * r.x_strides.token + head * r.x_strides.head;
            T* y = static_cast<T*>(r.y) + batch * r.y_strides.batch + token * r.y_strides.token +
                   head * r.y_strides.head;
            if (!known) {
                const float nan = detail::float_of(0x7fc00000u);
                for (std::int64_t i = 0; i < r.rotary_dim; ++i) y[i] = from_float<T>(nan);
            } else if (stream && can_stream(y) && can_stream(y + pairs)) {
                turn<true>(r.interleaved, x, y, cos, sin, sign, pairs);
            } else {
                turn<false>(r.interleaved, x, y, cos, sin, sign, pairs);
            }
            if (x != y) {
                for (std::int64_t i = r.rotary_dim; i < r.head_dim; ++i) y[i] = x[i];
            }
        }
    }
    if (stream) finish_streaming();
}

void run_any(const Rope& r, std::int64_t begin, std::int64_t end, bool stream) {
    with_element_type(r.dtype, [&](auto zero) FASTLLM_LAMBDA {
        run_tokens<decltype(zero)>(r, begin, end, stream);
    });
}

}  // namespace

const RopeKernels rope = {run_any};

}  // namespace fastllm::cpu::FASTLLM_ISA
