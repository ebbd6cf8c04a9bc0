// Compiled once per vector level; see simd/simd.hpp.
#include "rmsnorm_kernel.hpp"

#include "simd/column_sums.hpp"
#include "simd/simd.hpp"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

// `next` and `next_residual`, if there is one, are the rows that are read after this one.
template <class T, bool kStream, bool kResidual>
void normalise_row(const T* h, const T* weight, float rstd, T* y, const T* next,
                   const T* next_residual, std::int64_t cols) {
    const Vec scale = broadcast(rstd);
    for_each_pair(cols, [&](std::int64_t c, int, auto lanes) FASTLLM_LAMBDA {
        prefetch(next + c, lanes);
        if constexpr (kResidual) prefetch(next_residual + c, lanes);
        const auto v = load(h + c, lanes) * scale * load(weight + c, lanes);
        store_as<kStream>(y + c, v, lanes);
    });
}

template <class T>
float sum_of_squares(const T* x, std::int64_t cols) {
    Sum4 squares;
    for_each_pair(cols, [&](std::int64_t c, int slot, auto lanes) FASTLLM_LAMBDA {
        const auto v = load(x + c, lanes);
        squares.add_product(slot, v, v);
    });
    return squares.total();
}

// Writes h = round(x + residual), around the cache also to `out`, and returns the sum of its
// squares.
template <class T, bool kStream>
float add_and_sum_squares(const T* x, const T* residual, T* h, T* out, std::int64_t cols) {
    Sum4 squares;
    for_each_pair(cols, [&](std::int64_t c, int slot, auto lanes) FASTLLM_LAMBDA {
        const auto sum = load(x + c, lanes) + load(residual + c, lanes);
        store(h + c, sum, lanes);
        if constexpr (kStream) store_streaming(out + c, sum, lanes);
        const auto v = load(h + c, lanes);
        squares.add_product(slot, v, v);
    });
    return squares.total();
}

template <class T, bool kResidual>
void fwd_rows(const RmsNormFwd& a, std::int64_t begin, std::int64_t end, bool stream) {
    alignas(64) T kept[kResidual ? kRowBuffer : 1];
    const auto* weight = static_cast<const T*>(a.weight);
    for (std::int64_t row = begin; row < end; ++row) {
        const std::int64_t offset = row * a.cols;
        const T* x = static_cast<const T*>(a.x) + offset;
        const T* residual = static_cast<const T*>(a.residual) + (kResidual ? offset : 0);
        const T* h = x;
        T* y = static_cast<T*>(a.y) + offset;
        float squares;
        if constexpr (kResidual) {
            T* out = static_cast<T*>(a.residual_out) + offset;
            if (stream && a.cols <= kRowBuffer && can_stream(out) && out != x && out != residual) {
                squares = add_and_sum_squares<T, true>(x, residual, kept, out, a.cols);
                h = kept;
            } else {
                squares = add_and_sum_squares<T, false>(x, residual, out, nullptr, a.cols);
                h = out;
            }
        } else {
            squares = sum_of_squares(x, a.cols);
        }
        const float rstd = 1.0f / square_root(squares / static_cast<float>(a.cols) + a.eps);
        a.rstd[row] = rstd;
        auto* normalise = stream && can_stream(y) ? &normalise_row<T, true, kResidual>
                                                  : &normalise_row<T, false, kResidual>;
        normalise(h, weight, rstd, y, x + a.cols, residual + a.cols, a.cols);
    }
    if (stream) finish_streaming();
}

// Adds dy * h * rstd to `partial`, whose order within a pair of vectors is that of T, and returns
// sum_c(dy * weight * h).
template <class T>
float accumulate_dweight(const T* dy, const T* h, const T* weight, float rstd, float* partial,
                         std::int64_t cols) {
    const Vec scale = broadcast(rstd);
    Sum4 dots;
    for_each_pair(cols, [&](std::int64_t c, int slot, auto lanes) FASTLLM_LAMBDA {
        const auto product = load(dy + c, lanes) * (load(h + c, lanes) * scale);
        add_to(partial + c, product, lanes);
        dots.add_product(slot, product, load(weight + c, lanes));
    });
    return dots.total();
}

template <class T, bool kStream, bool kHasDh>
void input_gradient_row(const T* dy, const T* h, const T* weight, const T* dh, float rstd,
                        float dot, T* dx, std::int64_t cols) {
    const Vec scale = broadcast(rstd);
    const Vec pull = broadcast(-rstd * (dot / static_cast<float>(cols)) * rstd);
    for_each_pair(cols, [&](std::int64_t c, int, auto lanes) FASTLLM_LAMBDA {
        prefetch(dy + cols + c, lanes);
        prefetch(h + cols + c, lanes);
        const auto g = load(dy + c, lanes) * load(weight + c, lanes);
        auto v = multiply_add(load(h + c, lanes), pull, g * scale);
        if constexpr (kHasDh) v = v + load(dh + c, lanes);
        store_as<kStream>(dx + c, v, lanes);
    });
}

template <class T>
void bwd_part(const RmsNormBwd& a, std::int64_t part, bool stream) {
    const auto [begin, end] = rows_of_part(a, part);
    const auto* weight = static_cast<const T*>(a.weight);
    float* partial = a.partial + part * a.cols;
    for (std::int64_t c = 0; c < a.cols; ++c) partial[c] = 0.0f;
    for (std::int64_t row = begin; row < end; ++row) {
        const std::int64_t offset = row * a.cols;
        const T* dy = static_cast<const T*>(a.dy) + offset;
        const T* h = static_cast<const T*>(a.h) + offset;
        const T* dh = a.dh != nullptr ? static_cast<const T*>(a.dh) + offset : nullptr;
        T* dx = static_cast<T*>(a.dx) + offset;
        const float rstd = a.rstd[row];
        const float dot = accumulate_dweight(dy, h, weight, rstd, partial, a.cols);
        const bool go_around = stream && can_stream(dx);
        auto* gradient = go_around ? (dh != nullptr ? &input_gradient_row<T, true, true>
                                                    : &input_gradient_row<T, true, false>)
                                   : (dh != nullptr ? &input_gradient_row<T, false, true>
                                                    : &input_gradient_row<T, false, false>);
        gradient(dy, h, weight, dh, rstd, dot, dx, a.cols);
    }
    if (stream) finish_streaming();
}

void fwd_any(const RmsNormFwd& a, std::int64_t begin, std::int64_t end, bool stream) {
    with_element_type(a.dtype, [&](auto zero) FASTLLM_LAMBDA {
        using T = decltype(zero);
        auto* rows = a.residual != nullptr ? &fwd_rows<T, true> : &fwd_rows<T, false>;
        rows(a, begin, end, stream);
    });
}

void bwd_part_any(const RmsNormBwd& a, std::int64_t part, bool stream) {
    with_element_type(a.dtype,
                      [&](auto zero) FASTLLM_LAMBDA { bwd_part<decltype(zero)>(a, part, stream); });
}

void bwd_reduce_any(const RmsNormBwd& a, std::int64_t begin, std::int64_t end) {
    with_element_type(a.dtype, [&](auto zero) FASTLLM_LAMBDA {
        add_parts(a.partial, a.parts, a.cols, static_cast<decltype(zero)*>(a.dweight), begin, end);
    });
}

}  // namespace

const RmsNormKernels rmsnorm = {fwd_any, bwd_part_any, bwd_reduce_any};

}  // namespace fastllm::cpu::FASTLLM_ISA
