#pragma once

#include "product.cuh"

namespace fastllm::cuda::gemm {

template <class T>
void linear_bias_sm90(const LinearBias& a, void* stream) {
    using Fusion = cutlass::epilogue::fusion::LinCombPerColBias<T, float, T>;
    using Gemm = typename sm90::Product<T, void, T, Fusion>::Gemm;
    auto arguments = sm90::arguments<Gemm, T>(a.m, a.n, a.k, a.x, a.k, a.w, a.k);
    arguments.epilogue.ptr_D = static_cast<T*>(a.y);
    arguments.epilogue.dD = sm90::dense<typename Gemm::GemmKernel::StrideD>(a.n);
    arguments.epilogue.thread.bias_ptr = static_cast<const T*>(a.bias);  // null: zeros
    run<Gemm>(arguments, nullptr, stream, "linear_bias");
}

}  // namespace fastllm::cuda::gemm
