#include "linear_weight_grad.cuh"

template void fastllm::cuda::gemm::linear_weight_grad_sm90<cutlass::half_t>(
    const fastllm::LinearWeightGrad&, void*);
