#pragma once

#include <cutlass/epilogue/thread/activation.h>

#include "product.cuh"

namespace fastllm::cuda::gemm {

template <class T>
void linear_bias_gelu_sm90(const LinearBiasGelu& a, void* stream) {
    using Fusion = cutlass::epilogue::fusion::LinCombPerColBiasEltActAux<
        RowMajor, cutlass::epilogue::thread::GELU_taylor, T, float, T, T>;
    using Gemm = typename sm90::Product<T, void, T, Fusion>::Gemm;
    auto arguments = sm90::arguments<Gemm, T>(a.m, a.n, a.k, a.x, a.k, a.w, a.k);
    const auto dense = sm90::dense<typename Gemm::GemmKernel::StrideD>(a.n);
    arguments.epilogue.ptr_D = static_cast<T*>(a.y);
    arguments.epilogue.dD = dense;
    arguments.epilogue.thread.bias_ptr = static_cast<const T*>(a.bias);
    arguments.epilogue.thread.aux_ptr = static_cast<T*>(a.pre);
    arguments.epilogue.thread.dAux = dense;
    run<Gemm>(arguments, nullptr, stream, "linear_bias_gelu");
}

}  // namespace fastllm::cuda::gemm
