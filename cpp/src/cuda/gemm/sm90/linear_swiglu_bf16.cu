#include "linear_swiglu.cuh"

template void fastllm::cuda::gemm::linear_swiglu_sm90<cutlass::bfloat16_t>(
    const fastllm::LinearSwiglu&, void*);
