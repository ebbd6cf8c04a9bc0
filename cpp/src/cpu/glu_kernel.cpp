// Compiled once per vector level; see simd/simd.hpp.
#include "glu_kernel.hpp"

#include "simd/exp.hpp"
#include "simd/simd.hpp"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

// s and z' of the header's formula.
struct Gate {
    Vec s;
    Vec slope;
};

template <GluActivation kActivation>
FASTLLM_INLINE Gate gate_of(Vec v) {
    const Vec one = broadcast(1.0f);
    if constexpr (kActivation == GluActivation::kSilu) {
        return {one / (one + exponential(broadcast(0.0f) - v)), one};
    } else {
        constexpr float kScale = 1.5957691216057308f;  // 2 sqrt(2/pi)
        constexpr float kCubic = 0.044715f;
        // Beyond 30, s is 0 or 1 in float; the cube and the slope must not overflow.
        const Vec c = minimum(broadcast(30.0f), maximum(broadcast(-30.0f), v));
        const Vec square = c * c;
        const Vec z = c * multiply_add(square, broadcast(kScale * kCubic), broadcast(kScale));
        const Vec slope =
            multiply_add(square, broadcast(3.0f * kScale * kCubic), broadcast(kScale));
        return {one / (one + exponential(broadcast(0.0f) - z)), slope};
    }
}

template <class T, GluActivation kActivation, bool kStream>
void fwd_range(const GluFwd& a, std::int64_t begin, std::int64_t end) {
    const T* gate = static_cast<const T*>(a.gate) + begin;
    const T* up = static_cast<const T*>(a.up) + begin;
    T* y = static_cast<T*>(a.y) + begin;
    for_each_vec(end - begin, [&](std::int64_t i, int, auto lanes) FASTLLM_LAMBDA {
        const Vec g = load(gate + i, lanes);
        const Vec out = g * gate_of<kActivation>(g).s * load(up + i, lanes);
        store_as<kStream>(y + i, out, lanes);
    });
}

template <class T, GluActivation kActivation, bool kStream>
void bwd_range(const GluBwd& a, std::int64_t begin, std::int64_t end) {
    const T* dy = static_cast<const T*>(a.dy) + begin;
    const T* gate = static_cast<const T*>(a.gate) + begin;
    const T* up = static_cast<const T*>(a.up) + begin;
    T* dgate = static_cast<T*>(a.dgate) + begin;
    T* dup = static_cast<T*>(a.dup) + begin;
    for_each_vec(end - begin, [&](std::int64_t i, int, auto lanes) FASTLLM_LAMBDA {
        const Vec d = load(dy + i, lanes);
        const Vec g = load(gate + i, lanes);
        const Vec u = load(up + i, lanes);
        const Gate at = gate_of<kActivation>(g);
        const Vec activated = g * at.s;
        const Vec derivative = multiply_add(activated * (broadcast(1.0f) - at.s), at.slope, at.s);
        store_as<kStream>(dup + i, d * activated, lanes);
        store_as<kStream>(dgate + i, d * u * derivative, lanes);
    });
}

template <class T, GluActivation kActivation>
void fwd_typed(const GluFwd& a, std::int64_t begin, std::int64_t end, bool stream) {
    if (stream && can_stream(static_cast<T*>(a.y) + begin)) {
        fwd_range<T, kActivation, true>(a, begin, end);
        finish_streaming();
    } else {
        fwd_range<T, kActivation, false>(a, begin, end);
    }
}

template <class T, GluActivation kActivation>
void bwd_typed(const GluBwd& a, std::int64_t begin, std::int64_t end, bool stream) {
    if (stream && can_stream(static_cast<T*>(a.dgate) + begin) &&
        can_stream(static_cast<T*>(a.dup) + begin)) {
        bwd_range<T, kActivation, true>(a, begin, end);
        finish_streaming();
    } else {
        bwd_range<T, kActivation, false>(a, begin, end);
    }
}

template <class T>
void fwd_activated(const GluFwd& a, std::int64_t begin, std::int64_t end, bool stream) {
    auto* run = a.activation == GluActivation::kSilu ? &fwd_typed<T, GluActivation::kSilu>
                                                     : &fwd_typed<T, GluActivation::kGelu>;
    run(a, begin, end, stream);
}

template <class T>
void bwd_activated(const GluBwd& a, std::int64_t begin, std::int64_t end, bool stream) {
    auto* run = a.activation == GluActivation::kSilu ? &bwd_typed<T, GluActivation::kSilu>
                                                     : &bwd_typed<T, GluActivation::kGelu>;
    run(a, begin, end, stream);
}

void fwd_any(const GluFwd& a, std::int64_t begin, std::int64_t end, bool stream) {
    switch (a.dtype) {
        case DType::kFloat32:
            return fwd_activated<float>(a, begin, end, stream);
        case DType::kBFloat16:
            return fwd_activated<bfloat16>(a, begin, end, stream);
        case DType::kFloat16:
            return fwd_activated<float16>(a, begin, end, stream);
    }
}

void bwd_any(const GluBwd& a, std::int64_t begin, std::int64_t end, bool stream) {
    switch (a.dtype) {
        case DType::kFloat32:
            return bwd_activated<float>(a, begin, end, stream);
        case DType::kBFloat16:
            return bwd_activated<bfloat16>(a, begin, end, stream);
        case DType::kFloat16:
            return bwd_activated<float16>(a, begin, end, stream);
    }
}

}  // namespace

const GluKernels glu = {fwd_any, bwd_any};

}  // namespace fastllm::cpu::FASTLLM_ISA
