// Compiled once per vector level; see simd/simd.hpp.
#include "layernorm_kernel.hpp"

#include "simd/column_sums.hpp"
#include "simd/simd.hpp"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

template <class T>
float sum_of(const T* x, std::int64_t cols) {
    Sum4 sums;
    for_each_pair(cols, [&](std::int64_t c, int slot, auto lanes)
                            FASTLLM_LAMBDA { sums.add(slot, load(x + c, lanes)); });
    return sums.total();
}

// Writes h = round(x + residual), around the cache also to `out`, and returns its sum.
template <class T, bool kStream>
float add_and_sum(const T* x, const T* residual, T* h, T* out, std::int64_t cols) {
    Sum4 sums;
    for_each_pair(cols, [&](std::int64_t c, int slot, auto lanes) FASTLLM_LAMBDA {
        const auto sum = load(x + c, lanes) + load(residual + c, lanes);
        store(h + c, sum, lanes);
        if constexpr (kStream) store_streaming(out + c, sum, lanes);
        sums.add(slot, load(h + c, lanes));
    });
    return sums.total();
}

template <class T>
float sum_of_squares_about(const T* x, float mean, std::int64_t cols) {
    const Vec middle = broadcast(mean);
    Sum4 squares;
    const std::int64_t whole = cols / kWidth * kWidth;  // lanes that are not loaded would count
    for_each_pair(whole, [&](std::int64_t c, int slot, auto lanes) FASTLLM_LAMBDA {
        const auto d = load(x + c, lanes) - middle;
        squares.add_product(slot, d, d);
    });
    float total = squares.total();
    for (std::int64_t c = whole; c < cols; ++c) {
        const float d = to_float(x[c]) - mean;
        total += d * d;
    }
    return total;
}

// `next` and `next_residual`, if there is one, are the rows that are read after this one.
template <class T, bool kStream, bool kHasBias, bool kResidual>
void normalise_row(const T* h, const T* weight, const T* bias, float mean, float rstd, T* y,
                   const T* next, const T* next_residual, std::int64_t cols) {
    const Vec middle = broadcast(mean);
    const Vec scale = broadcast(rstd);
    for_each_pair(cols, [&](std::int64_t c, int, auto lanes) FASTLLM_LAMBDA {
        prefetch(next + c, lanes);
        if constexpr (kResidual) prefetch(next_residual + c, lanes);
        const auto n = (load(h + c, lanes) - middle) * scale;
        const auto w = load(weight + c, lanes);
        if constexpr (kHasBias) {
            store_as<kStream>(y + c, multiply_add(n, w, load(bias + c, lanes)), lanes);
        } else {
            store_as<kStream>(y + c, n * w, lanes);
        }
    });
}

template <class T, bool kResidual>
void fwd_rows(const LayerNormFwd& a, std::int64_t begin, std::int64_t end, bool stream) {
    alignas(64) T kept[kResidual ? kRowBuffer : 1];
    const auto* weight = static_cast<const T*>(a.weight);
    const auto* bias = static_cast<const T*>(a.bias);
    const float cols = static_cast<float>(a.cols);
    for (std::int64_t row = begin; row < end; ++row) {
        const std::int64_t offset = row * a.cols;
        const T* x = static_cast<const T*>(a.x) + offset;
        const T* residual = static_cast<const T*>(a.residual) + (kResidual ? offset : 0);
        const T* h = x;
        T* y = static_cast<T*>(a.y) + offset;
        float sum;
        if constexpr (kResidual) {
            T* out = static_cast<T*>(a.residual_out) + offset;
            if (stream && a.cols <= kRowBuffer && can_stream(out) && out != x && out != residual) {
                sum = add_and_sum<T, true>(x, residual, kept, out, a.cols);
                h = kept;
            } else {
                sum = add_and_sum<T, false>(x, residual, out, nullptr, a.cols);
                h = out;
            }
        } else {
            sum = sum_of(x, a.cols);
        }
        const float mean = sum / cols;
        const float rstd = 1.0f / square_root(sum_of_squares_about(h, mean, a.cols) / cols + a.eps);
        a.mean[row] = mean;
        a.rstd[row] = rstd;
        const bool go_around = stream && can_stream(y);
        auto* normalise = go_around
                              ? (bias != nullptr ? &normalise_row<T, true, true, kResidual>
                                                 : &normalise_row<T, true, false, kResidual>)
                              : (bias != nullptr ? &normalise_row<T, false, true, kResidual>
                                                 : &normalise_row<T, false, false, kResidual>);
        normalise(h, weight, bias, mean, rstd, y, x + a.cols, residual + a.cols, a.cols);
    }
    if (stream) finish_streaming();
}

// sum_c(g) and sum_c(g * n).
struct Dots {
    float g;
    float gn;
};

// Adds dy * n to `dweight` and dy to `dbias`, whose order within a pair of vectors is that of T.
template <class T>
Dots accumulate(const T* dy, const T* h, const T* weight, float mean, float rstd, float* dweight,
                float* dbias, std::int64_t cols) {
    const Vec middle = broadcast(mean);
    const Vec scale = broadcast(rstd);
    Sum4 g_sums;
    Sum4 gn_sums;
    for_each_pair(cols, [&](std::int64_t c, int slot, auto lanes) FASTLLM_LAMBDA {
        const auto d = load(dy + c, lanes);
        const auto product = d * ((load(h + c, lanes) - middle) * scale);
        const auto w = load(weight + c, lanes);
        add_to(dweight + c, product, lanes);
        add_to(dbias + c, d, lanes);
        g_sums.add_product(slot, d, w);
        gn_sums.add_product(slot, product, w);
    });
    return {g_sums.total(), gn_sums.total()};
}

template <class T, bool kStream, bool kHasDh>
void input_gradient_row(const T* dy, const T* h, const T* weight, const T* dh, float mean,
                        float rstd, Dots dots, T* dx, std::int64_t cols) {
    // dx = rstd * g + h * pull + constant
    const float pull = -rstd * rstd * (dots.gn / static_cast<float>(cols));
    const Vec scale = broadcast(rstd);
    const Vec slope = broadcast(pull);
    const Vec middle = broadcast(mean);
    const Vec constant = broadcast(-rstd * (dots.g / static_cast<float>(cols)));
    for_each_pair(cols, [&](std::int64_t c, int, auto lanes) FASTLLM_LAMBDA {
        prefetch(dy + cols + c, lanes);
        prefetch(h + cols + c, lanes);
        const auto g = load(dy + c, lanes) * load(weight + c, lanes);
        auto v = multiply_add(load(h + c, lanes) - middle, slope, multiply_add(g, scale, constant));
        if constexpr (kHasDh) v = v + load(dh + c, lanes);
        store_as<kStream>(dx + c, v, lanes);
    });
}

template <class T>
void bwd_part(const LayerNormBwd& a, std::int64_t part, bool stream) {
    const auto [begin, end] = rows_of_part(a, part);
    const auto* weight = static_cast<const T*>(a.weight);
    float* dweight = a.partial + part * a.cols;
    float* dbias = dweight + a.parts * a.cols;
    for (std::int64_t c = 0; c < a.cols; ++c) dweight[c] = dbias[c] = 0.0f;
    for (std::int64_t row = begin; row < end; ++row) {
        const std::int64_t offset = row * a.cols;
        const T* dy = static_cast<const T*>(a.dy) + offset;
        const T* h = static_cast<const T*>(a.h) + offset;
        const T* dh = a.dh != nullptr ? static_cast<const T*>(a.dh) + offset : nullptr;
        T* dx = static_cast<T*>(a.dx) + offset;
        const Dots dots =
            accumulate(dy, h, weight, a.mean[row], a.rstd[row], dweight, dbias, a.cols);
        const bool go_around = stream && can_stream(dx);
        auto* gradient = go_around ? (dh != nullptr ? &input_gradient_row<T, true, true>
                                                    : &input_gradient_row<T, true, false>)
                                   : (dh != nullptr ? &input_gradient_row<T, false, true>
                                                    : &input_gradient_row<T, false, false>);
        gradient(dy, h, weight, dh, a.mean[row], a.rstd[row], dots, dx, a.cols);
    }
    if (stream) finish_streaming();
}

void fwd_any(const LayerNormFwd& a, std::int64_t begin, std::int64_t end, bool stream) {
    with_element_type(a.dtype, [&](auto zero) FASTLLM_LAMBDA {
        using T = decltype(zero);
        auto* rows = a.residual != nullptr ? &fwd_rows<T, true> : &fwd_rows<T, false>;
        rows(a, begin, end, stream);
    });
}

void bwd_part_any(const LayerNormBwd& a, std::int64_t part, bool stream) {
    with_element_type(a.dtype,
                      [&](auto zero) FASTLLM_LAMBDA { bwd_part<decltype(zero)>(a, part, stream); });
}

void bwd_reduce_any(const LayerNormBwd& a, std::int64_t begin, std::int64_t end) {
    with_element_type(a.dtype, [&](auto zero) FASTLLM_LAMBDA {
        using T = decltype(zero);
        add_parts(a.partial, a.parts, a.cols, static_cast<T*>(a.dweight), begin, end);
        if (a.dbias == nullptr) return;
        add_parts(a.partial + a.parts * a.cols, a.parts, a.cols, static_cast<T*>(a.dbias), begin,
                  end);
    });
}

}  // namespace

const LayerNormKernels layernorm = {fwd_any, bwd_part_any, bwd_reduce_any};

}  // namespace fastllm::cpu::FASTLLM_ISA
