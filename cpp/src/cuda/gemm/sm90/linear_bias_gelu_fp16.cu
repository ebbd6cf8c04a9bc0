#include "linear_bias_gelu.cuh"

template void fastllm::cuda::gemm::linear_bias_gelu_sm90<cutlass::half_t>(
    const fastllm::LinearBiasGelu&, void*);
