// Compiled once per vector level; see simd/simd.hpp.
#include "adamw_kernel.hpp"

#include "simd/simd.hpp"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

// Stands for the type of a model copy that is not wanted.
struct NoCopy {};

template <class Grad, class Model>
void run_range(const AdamW& a, std::int64_t begin, std::int64_t end) {
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
        const Vec p = multiply_add(load(a.master + at, lanes), keep, step * m / denominator);
        store(a.exp_avg + at, m, lanes);
        store(a.exp_avg_sq + at, v, lanes);
        store(a.master + at, p, lanes);
        if constexpr (sizeof(Model) > 1) store(static_cast<Model*>(a.model) + at, p, lanes);
    });
}

template <class Grad>
void run_grad(const AdamW& a, std::int64_t begin, std::int64_t end) {
    static_assert(sizeof(NoCopy) == 1);
    if (a.model == nullptr) return run_range<Grad, NoCopy>(a, begin, end);
    switch (a.model_dtype) {
        case DType::kFloat32:
            return run_range<Grad, float>(a, begin, end);
        case DType::kBFloat16:
            return run_range<Grad, bfloat16>(a, begin, end);
        case DType::kFloat16:
            return run_range<Grad, float16>(a, begin, end);
    }
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
