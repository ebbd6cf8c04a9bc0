#include "linear_bias.cuh"

template void fastllm::cuda::gemm::linear_bias_sm90<cutlass::bfloat16_t>(const fastllm::LinearBias&,
                                                                         void*);
