#pragma once

#include "product.cuh"

namespace fastllm::cuda::gemm {

template <class T>
void linear_weight_grad_sm90(const LinearWeightGrad& a, void* stream) {
    // dw (n, k) += dy^T (n, m) x (m, k): both operands lie across the depth, which is m.
    using Fusion = cutlass::epilogue::fusion::LinearCombination<float, float>;
    using Gemm = typename sm90::Product<T, float, float, Fusion, ColumnMajor, RowMajor>::Gemm;
    auto arguments = sm90::arguments<Gemm, T>(a.n, a.k, a.m, a.dy, a.n, a.x, a.k);
    // In place: a block reads a tile of dw before it writes it.
    arguments.epilogue.ptr_C = arguments.epilogue.ptr_D = a.dw;
    arguments.epilogue.dC = arguments.epilogue.dD =
        sm90::dense<typename Gemm::GemmKernel::StrideD>(a.k);
    arguments.epilogue.thread.beta = 1.0f;
    run<Gemm>(arguments, nullptr, stream, "linear_weight_grad");
}

}  // namespace fastllm::cuda::gemm
