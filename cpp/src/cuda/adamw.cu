#include "adamw.cuh"
#include "launch.hpp"

namespace fastllm::cuda {
namespace {

AdamWStep step_of(const AdamW& a) {
    return {a.beta1,
            a.beta2,
            1.0f - a.lr * a.weight_decay,
            -a.lr / a.bias_correction1,
            1.0f / a.root_bias_correction2,
            a.eps};
}

template <class Grad, class Model, int kWidth>
void launch(const AdamW& a, void* stream) {
    const auto adamw = &adamw_kernel<Grad, Model, kWidth>;
    FASTLLM_LAUNCH(adamw, dim3(blocks_of(a.count, kAdamWThreads * kWidth)), dim3(kAdamWThreads),
                   stream, a.master, a.exp_avg, a.exp_avg_sq, static_cast<const Grad*>(a.grad),
                   a.grad_scale, static_cast<Model*>(a.model), a.count, step_of(a));
    check(cudaGetLastError(), "adamw");
}

template <class Grad, int kWidth>
void launch_halves(const AdamW& a, void* stream) {
    const auto adamw = &adamw_halves_kernel<Grad, kWidth>;
    FASTLLM_LAUNCH(adamw, dim3(blocks_of(a.count, kAdamWThreads * kWidth)), dim3(kAdamWThreads),
                   stream, static_cast<__nv_bfloat16*>(a.model), a.lower, a.exp_avg, a.exp_avg_sq,
                   static_cast<const Grad*>(a.grad), a.grad_scale, a.count, step_of(a));
    check(cudaGetLastError(), "adamw");
}

template <class Grad>
void run_halves(const AdamW& a, void* stream) {
    const bool aligned = aligned16({a.model, a.lower, a.exp_avg, a.exp_avg_sq, a.grad});
    if (aligned) return launch_halves<Grad, 4>(a, stream);
    launch_halves<Grad, 1>(a, stream);
}

template <class Grad, class Model>
void run(const AdamW& a, void* stream) {
    const bool aligned = aligned16({a.master, a.exp_avg, a.exp_avg_sq, a.grad, a.model});
    if (aligned) return launch<Grad, Model, 4>(a, stream);
    launch<Grad, Model, 1>(a, stream);
}

template <class Grad>
void run_grad(const AdamW& a, void* stream) {
    if (a.master == nullptr) return run_halves<Grad>(a, stream);
    if (a.model == nullptr) return run<Grad, float>(a, stream);
    switch (a.model_dtype) {
        case DType::kFloat32:
            return run<Grad, float>(a, stream);
        case DType::kBFloat16:
            return run<Grad, __nv_bfloat16>(a, stream);
        case DType::kFloat16:
            return run<Grad, __half>(a, stream);
    }
}

}  // namespace

void adamw(const AdamW& args, void* stream) {
    if (args.count == 0) return;
    switch (args.grad_dtype) {
        case DType::kFloat32:
            return run_grad<float>(args, stream);
        case DType::kBFloat16:
            return run_grad<__nv_bfloat16>(args, stream);
        case DType::kFloat16:
            return run_grad<__half>(args, stream);
    }
}

}  // namespace fastllm::cuda
