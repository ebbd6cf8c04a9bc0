// Compiled once per vector level; see simd/simd.hpp.
#include "glu_kernel.hpp"

#include "simd/gelu.hpp"
#include "simd/simd.hpp"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

// s and z' of the header's formula.
template <GluActivation kActivation, class V>
FASTLLM_INLINE Gate<V> gate_of(V v) {
    if constexpr (kActivation == GluActivation::kSilu) {
        const V one = broadcast(1.0f);
        return {logistic(v, one), one};
    } else {
        return gelu_gate(v);
    }
}

template <class T, GluActivation kActivation, bool kStream>
void fwd_range(const GluFwd& a, std::int64_t begin, std::int64_t end) {
    const T* gate = static_cast<const T*>(a.gate) + begin;
    const T* up = static_cast<const T*>(a.up) + begin;
    T* y = static_cast<T*>(a.y) + begin;
    for_each_pair(end - begin, [&](std::int64_t i, int, auto lanes) FASTLLM_LAMBDA {
        prefetch(gate + i + kAhead<T>, lanes);
        prefetch(up + i + kAhead<T>, lanes);
        const auto g = load(gate + i, lanes);
        const auto out = g * gate_of<kActivation>(g).s * load(up + i, lanes);
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
    for_each_pair(end - begin, [&](std::int64_t i, int, auto lanes) FASTLLM_LAMBDA {
        prefetch(dy + i + kAhead<T>, lanes);
        prefetch(gate + i + kAhead<T>, lanes);
        prefetch(up + i + kAhead<T>, lanes);
        const auto d = load(dy + i, lanes);
        const auto g = load(gate + i, lanes);
        const auto u = load(up + i, lanes);
        const auto at = gate_of<kActivation>(g);
        store_as<kStream>(dup + i, d * (g * at.s), lanes);
        store_as<kStream>(dgate + i, d * u * derivative(g, at), lanes);
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
    with_element_type(a.dtype, [&](auto zero) FASTLLM_LAMBDA {
        fwd_activated<decltype(zero)>(a, begin, end, stream);
    });
}

void bwd_any(const GluBwd& a, std::int64_t begin, std::int64_t end, bool stream) {
    with_element_type(a.dtype, [&](auto zero) FASTLLM_LAMBDA {
        bwd_activated<decltype(zero)>(a, begin, end, stream);
    });
}

}  // namespace

const GluKernels glu = {fwd_any, bwd_any};

}  // namespace fastllm::cpu::FASTLLM_ISA
