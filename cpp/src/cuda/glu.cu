#include "glu.cuh"
#include "launch.hpp"

namespace fastllm::cuda {
namespace {

template <class T, int kWidth, GluActivation kActivation>
void launch_fwd(const GluFwd& a, void* stream) {
    const auto glu_fwd = &glu_fwd_kernel<T, kWidth, kActivation>;
    FASTLLM_LAUNCH(glu_fwd, dim3(blocks_of(a.count, kGluThreads * kWidth)), dim3(kGluThreads),
                   stream, static_cast<const T*>(a.gate), static_cast<const T*>(a.up),
                   static_cast<T*>(a.y), a.count);
    check(cudaGetLastError(), "glu_fwd");
}

template <class T, int kWidth, GluActivation kActivation>
void launch_bwd(const GluBwd& a, void* stream) {
    const auto glu_bwd = &glu_bwd_kernel<T, kWidth, kActivation>;
    FASTLLM_LAUNCH(glu_bwd, dim3(blocks_of(a.count, kGluThreads * kWidth)), dim3(kGluThreads),
                   stream, static_cast<const T*>(a.dy), static_cast<const T*>(a.gate),
                   static_cast<const T*>(a.up), static_cast<T*>(a.dgate), static_cast<T*>(a.dup),
                   a.count);
    check(cudaGetLastError(), "glu_bwd");
}

template <class T, GluActivation kActivation>
void fwd(const GluFwd& a, void* stream) {
    if (!aligned16({a.gate, a.up, a.y})) return launch_fwd<T, 1, kActivation>(a, stream);
    launch_fwd<T, kPackWidth<T>, kActivation>(a, stream);
}

template <class T, GluActivation kActivation>
void bwd(const GluBwd& a, void* stream) {
    const bool aligned = aligned16({a.dy, a.gate, a.up, a.dgate, a.dup});
    if (!aligned) return launch_bwd<T, 1, kActivation>(a, stream);
    launch_bwd<T, kPackWidth<T>, kActivation>(a, stream);
}

template <class T>
void fwd_activated(const GluFwd& a, void* stream) {
    if (a.activation == GluActivation::kSilu) return fwd<T, GluActivation::kSilu>(a, stream);
    fwd<T, GluActivation::kGelu>(a, stream);
}

template <class T>
void bwd_activated(const GluBwd& a, void* stream) {
    if (a.activation == GluActivation::kSilu) return bwd<T, GluActivation::kSilu>(a, stream);
    bwd<T, GluActivation::kGelu>(a, stream);
}

}  // namespace

void glu_fwd(const GluFwd& args, void* stream) {
    if (args.count == 0) return;
    switch (args.dtype) {
        case DType::kFloat32:
            return fwd_activated<float>(args, stream);
        case DType::kBFloat16:
            return fwd_activated<__nv_bfloat16>(args, stream);
        case DType::kFloat16:
            return fwd_activated<__half>(args, stream);
    }
}

void glu_bwd(const GluBwd& args, void* stream) {
    if (args.count == 0) return;
    switch (args.dtype) {
        case DType::kFloat32:
            return bwd_activated<float>(args, stream);
        case DType::kBFloat16:
            return bwd_activated<__nv_bfloat16>(args, stream);
        case DType::kFloat16:
            return bwd_activated<__half>(args, stream);
    }
}

}  // namespace fastllm::cuda
