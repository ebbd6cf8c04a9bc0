#include "linear_weight_grad.cuh"

template void fastllm::cuda::gemm::linear_weight_grad<cutlass::half_t>(
    const fastllm::LinearWeightGrad&, void*);
