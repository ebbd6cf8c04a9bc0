// AdamW kernel; the formula is in fastllm/adamw.hpp. Each thread takes kWidth consecutive elements:
// 4 are one 16-byte access of a float32 tensor, one of 8 bytes of a narrower one.
#pragma once

#include "device.cuh"
#include "fastllm/adamw.hpp"

namespace fastllm::cuda {

inline constexpr int kAdamWThreads = 256;

// The coefficients that are the same for all elements.
struct AdamWStep {
    float beta1;
    float beta2;
    float keep;      // 1 - lr * weight_decay
    float step;      // -lr / bias_correction1
    float per_root;  // 1 / root_bias_correction2
    float eps;
};

struct AdamWState {
    float master;
    float exp_avg;
    float exp_avg_sq;
};

__device__ __forceinline__ AdamWState adamw_element(AdamWState s, float g, const AdamWStep& c) {
    const float m = c.beta1 * s.exp_avg + (1.0f - c.beta1) * g;
    const float v = c.beta2 * s.exp_avg_sq + (1.0f - c.beta2) * g * g;
    const float denominator = sqrtf(v) * c.per_root + c.eps;
    return {s.master * c.keep + c.step * m / denominator, m, v};
}

// float32 whose bits are those of `upper` times 2^16, plus `lower`.
__device__ __forceinline__ float join_halves(__nv_bfloat16 upper, std::int16_t lower) {
    const unsigned high = static_cast<unsigned>(__bfloat16_as_ushort(upper)) << 16;
    return __uint_as_float(high + static_cast<unsigned>(static_cast<int>(lower)));
}

struct Halves {
    __nv_bfloat16 upper;
    std::int16_t lower;
};

// `upper` is the value rounded to nearest, ties away from zero. Any NaN becomes the one without
// payload, which rounding cannot carry over into infinity.
__device__ __forceinline__ Halves split_halves(float value) {
    const unsigned bits = value == value ? __float_as_uint(value) : 0x7fc00000u;
    return {__ushort_as_bfloat16(static_cast<unsigned short>((bits + 0x8000u) >> 16)),
            static_cast<std::int16_t>(bits & 0xffffu)};
}

template <class Grad, class Model>
__device__ __forceinline__ void adamw_one(float* master, float* exp_avg, float* exp_avg_sq,
                                          const Grad* grad, Model* model, std::int64_t i,
                                          float scale, const AdamWStep& c) {
    const AdamWState s =
        adamw_element({master[i], exp_avg[i], exp_avg_sq[i]}, to_float(grad[i]) * scale, c);
    master[i] = s.master;
    exp_avg[i] = s.exp_avg;
    exp_avg_sq[i] = s.exp_avg_sq;
    if (model != nullptr) model[i] = from_float<Model>(s.master);
}

// model may be null.
template <class Grad, class Model, int kWidth>
__global__ void __launch_bounds__(kAdamWThreads)
    adamw_kernel(float* __restrict__ master, float* __restrict__ exp_avg,
                 float* __restrict__ exp_avg_sq, const Grad* __restrict__ grad,
                 const float* __restrict__ grad_scale, Model* __restrict__ model,
                 std::int64_t count, const AdamWStep c) {
    const float scale = grad_scale != nullptr ? *grad_scale : 1.0f;
    const std::int64_t begin =
        (static_cast<std::int64_t>(blockIdx.x) * kAdamWThreads + threadIdx.x) * kWidth;
    if (begin + kWidth > count) {
        for (std::int64_t i = begin; i < count; ++i) {
            adamw_one(master, exp_avg, exp_avg_sq, grad, model, i, scale, c);
        }
        return;
    }
    Pack<float, kWidth> p = load_pack<kWidth>(master + begin);
    Pack<float, kWidth> m = load_pack<kWidth>(exp_avg + begin);
    Pack<float, kWidth> v = load_pack<kWidth>(exp_avg_sq + begin);
    const Pack<Grad, kWidth> g = load_pack<kWidth>(grad + begin);
    Pack<Model, kWidth> out;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
        const AdamWState s =
            adamw_element({p.lane[j], m.lane[j], v.lane[j]}, to_float(g.lane[j]) * scale, c);
        p.lane[j] = s.master;
        m.lane[j] = s.exp_avg;
        v.lane[j] = s.exp_avg_sq;
        out.lane[j] = from_float<Model>(s.master);
    }
    store_pack<kWidth>(master + begin, p);
    store_pack<kWidth>(exp_avg + begin, m);
    store_pack<kWidth>(exp_avg_sq + begin, v);
    if (model != nullptr) store_pack<kWidth>(model + begin, out);
}

template <class Grad>
__device__ __forceinline__ void adamw_halves_one(__nv_bfloat16* upper, std::int16_t* lower,
                                                 float* exp_avg, float* exp_avg_sq,
                                                 const Grad* grad, std::int64_t i, float scale,
                                                 const AdamWStep& c) {
    const float master = join_halves(upper[i], lower[i]);
    const AdamWState s =
        adamw_element({master, exp_avg[i], exp_avg_sq[i]}, to_float(grad[i]) * scale, c);
    const Halves halves = split_halves(s.master);
    upper[i] = halves.upper;
    lower[i] = halves.lower;
    exp_avg[i] = s.exp_avg;
    exp_avg_sq[i] = s.exp_avg_sq;
}

// Masters in halves, of which `upper` is the model's weight.
template <class Grad, int kWidth>
__global__ void __launch_bounds__(kAdamWThreads)
    adamw_halves_kernel(__nv_bfloat16* __restrict__ upper, std::int16_t* __restrict__ lower,
                        float* __restrict__ exp_avg, float* __restrict__ exp_avg_sq,
                        const Grad* __restrict__ grad, const float* __restrict__ grad_scale,
                        std::int64_t count, const AdamWStep c) {
    const float scale = grad_scale != nullptr ? *grad_scale : 1.0f;
    const std::int64_t begin =
        (static_cast<std::int64_t>(blockIdx.x) * kAdamWThreads + threadIdx.x) * kWidth;
    if (begin + kWidth > count) {
        for (std::int64_t i = begin; i < count; ++i) {
            adamw_halves_one(upper, lower, exp_avg, exp_avg_sq, grad, i, scale, c);
        }
        return;
    }
    Pack<__nv_bfloat16, kWidth> high = load_pack<kWidth>(upper + begin);
    Pack<std::int16_t, kWidth> low = load_pack<kWidth>(lower + begin);
    Pack<float, kWidth> m = load_pack<kWidth>(exp_avg + begin);
    Pack<float, kWidth> v = load_pack<kWidth>(exp_avg_sq + begin);
    const Pack<Grad, kWidth> g = load_pack<kWidth>(grad + begin);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
        const float master = join_halves(high.lane[j], low.lane[j]);
        const AdamWState s =
            adamw_element({master, m.lane[j], v.lane[j]}, to_float(g.lane[j]) * scale, c);
        const Halves halves = split_halves(s.master);
        high.lane[j] = halves.upper;
        low.lane[j] = halves.lower;
        m.lane[j] = s.exp_avg;
        v.lane[j] = s.exp_avg_sq;
    }
    store_pack<kWidth>(upper + begin, high);
    store_pack<kWidth>(lower + begin, low);
    store_pack<kWidth>(exp_avg + begin, m);
    store_pack<kWidth>(exp_avg_sq + begin, v);
}

}  // namespace fastllm::cuda
