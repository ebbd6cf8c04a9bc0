// Compiled once per vector level; see simd/simd.hpp.
#include "adamw_kernel.hpp"

#include "simd/simd.hpp"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

// Where the masters are, and what else receives them: float32 alone, with a copy of type Model, or
// in halves.
struct Alone {
    float* master;
    template <class Lanes>
    FASTLLM_INLINE Vec read(std::int64_t at, Lanes lanes) const {
        return load(master + at, lanes);
    }
    template <class Lanes>
    FASTLLM_INLINE void write(std::int64_t at, Vec p, Lanes lanes) const {
        store(master + at, p, lanes);
    }
};

template <class Model>
struct WithCopy {
    Alone alone;
    Model* model;
    template <class Lanes>
    FASTLLM_INLINE Vec read(std::int64_t at, Lanes lanes) const {
        return alone.read(at, lanes);
    }
    template <class Lanes>
    FASTLLM_INLINE void write(std::int64_t at, Vec p, Lanes lanes) const {
        alone.write(at, p, lanes);
        store(model + at, p, lanes);
    }
};

struct InHalves {
    bfloat16* upper;
    std::int16_t* lower;
    template <class Lanes>
    FASTLLM_INLINE Vec read(std::int64_t at, Lanes lanes) const {
        return load_halves(upper + at, lower + at, lanes);
    }
    template <class Lanes>
    FASTLLM_INLINE void write(std::int64_t at, Vec p, Lanes lanes) const {
        store_halves(upper + at, lower + at, p, lanes);
    }
};

template <class Grad, class Masters>
void run_range(const AdamW& a, const Masters masters, std::int64_t begin, std::int64_t end) {
    const Vec scale = broadcast(a.grad_scale != nullptr ? *a.grad_scale : 1.0f);
    const Vec beta1 = broadcast(a.beta1);
    const Vec beta2 = broadcast(a.beta2);
    const Vec rest1 = broadcast(1.0f - a.beta1);
    const Vec rest2 = broadcast(1.0f - a.beta2);
    const Vec keep = broadcast(1.0f - a.lr * a.weight_decay);
    const Vec step = broadcast(-a.lr / a.bias_correction1);
    const Vec per_root = broadcast(1.0f / a.root_bias_correction2);
    const Vec eps = broadcast(a.eps);
    const Grad* grad = static_cast<const Grad*>(a.grad);
    for_each_vec(end - begin, [&](std::int64_t i, int, auto lanes) FASTLLM_LAMBDA {
        const std::int64_t at = begin + i;
        const Vec g = load(grad + at, lanes) * scale;
        const Vec m = multiply_add(load(a.exp_avg + at, lanes), beta1, g * rest1);
        const Vec v = multiply_add(load(a.exp_avg_sq + at, lanes), beta2, g * g * rest2);
        const Vec denominator = multiply_add(square_root(v), per_root, eps);
        const Vec p = multiply_add(masters.read(at, lanes), keep, step * m / denominator);
        store(a.exp_avg + at, m, lanes);
        store(a.exp_avg_sq + at, v, lanes);
        masters.write(at, p, lanes);
    });
}

template <class Grad>
void run_grad(const AdamW& a, std::int64_t begin, std::int64_t end) {
    if (a.master == nullptr) {
        const InHalves halves{static_cast<bfloat16*>(a.model), a.lower};
        return run_range<Grad>(a, halves, begin, end);
    }
    const Alone alone{a.master};
    if (a.model == nullptr) return run_range<Grad>(a, alone, begin, end);
    with_element_type(a.model_dtype, [&](auto type) FASTLLM_LAMBDA {
        using Model = decltype(type);
        run_range<Grad>(a, WithCopy<Model>{alone, static_cast<Model*>(a.model)}, begin, end);
    });
}

void run_any(const AdamW& a, std::int64_t begin, std::int64_t end) {
    switch (a.grad_dtype) {
        case DType::kFloat32:
            return run_grad<float>(a, begin, end);
        case DType::kBFloat16:
            return run_grad<bfloat16>(a, begin, end);
        case DType::kFloat16:
            return run_grad<float16>(a, begin, end);
    }
}

}  // namespace

const AdamWKernels adamw = {run_any};

}  // namespace fastllm::cpu::FASTLLM_ISA
