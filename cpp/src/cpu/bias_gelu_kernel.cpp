// Compiled once per vector level; see simd/simd.hpp.
#include "bias_gelu_kernel.hpp"

#include "simd/column_sums.hpp"
#include "simd/gelu.hpp"
#include "simd/simd.hpp"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

template <class T, bool kStream>
void activate_row(const T* x, const T* bias, T* y, std::int64_t cols) {
    for_each_pair(cols, [&](std::int64_t c, int, auto lanes) FASTLLM_LAMBDA {
        prefetch(x + c + kAhead<T>, lanes);
        const auto v = load(x + c, lanes) + load(bias + c, lanes);
        store_as<kStream>(y + c, v * gelu_gate(v).s, lanes);
    });
}

template <class T>
void fwd_rows(const BiasGeluFwd& a, std::int64_t begin, std::int64_t end, bool stream) {
    for (std::int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(a.x) + row * a.cols;
        T* y = static_cast<T*>(a.y) + row * a.cols;
        auto* activate = stream && can_stream(y) ? &activate_row<T, true> : &activate_row<T, false>;
        activate(x, static_cast<const T*>(a.bias), y, a.cols);
    }
    if (stream) finish_streaming();
}

// Adds the gradient to `partial`, whose order within a pair of vectors is that of T.
template <class T, bool kStream>
void gradient_row(const T* dy, const T* x, const T* bias, T* dx, float* partial,
                  std::int64_t cols) {
    for_each_pair(cols, [&](std::int64_t c, int, auto lanes) FASTLLM_LAMBDA {
        prefetch(x + c + kAhead<T>, lanes);
        prefetch(dy + c + kAhead<T>, lanes);
        const auto v = load(x + c, lanes) + load(bias + c, lanes);
        const auto d = load(dy + c, lanes) * derivative(v, gelu_gate(v));
        add_to(partial + c, d, lanes);
        store_as<kStream>(dx + c, d, lanes);
    });
}

template <class T>
void bwd_part(const BiasGeluBwd& a, std::int64_t part, bool stream) {
    const auto [begin, end] = rows_of_part(a, part);
    float* partial = a.partial + part * a.cols;
    for (std::int64_t c = 0; c < a.cols; ++c) partial[c] = 0.0f;
    for (std::int64_t row = begin; row < end; ++row) {
        const std::int64_t offset = row * a.cols;
        T* dx = static_cast<T*>(a.dx) + offset;
        auto* gradient =
            stream && can_stream(dx) ? &gradient_row<T, true> : &gradient_row<T, false>;
        gradient(static_cast<const T*>(a.dy) + offset, static_cast<const T*>(a.x) + offset,
                 static_cast<const T*>(a.bias), dx, partial, a.cols);
    }
    if (stream) finish_streaming();
}

void fwd_any(const BiasGeluFwd& a, std::int64_t begin, std::int64_t end, bool stream) {
    with_element_type(a.dtype, [&](auto zero) FASTLLM_LAMBDA {
        fwd_rows<decltype(zero)>(a, begin, end, stream);
    });
}

void bwd_part_any(const BiasGeluBwd& a, std::int64_t part, bool stream) {
    with_element_type(a.dtype,
                      [&](auto zero) FASTLLM_LAMBDA { bwd_part<decltype(zero)>(a, part, stream); });
}

void bwd_reduce_any(const BiasGeluBwd& a, std::int64_t begin, std::int64_t end) {
    with_element_type(a.dtype, [&](auto zero) FASTLLM_LAMBDA {
        add_parts(a.partial, a.parts, a.cols, static_cast<decltype(zero)*>(a.dbias), begin, end);
    });
}

}  // namespace

const BiasGeluKernels bias_gelu = {fwd_any, bwd_part_any, bwd_reduce_any};

}  // namespace fastllm::cpu::FASTLLM_ISA
