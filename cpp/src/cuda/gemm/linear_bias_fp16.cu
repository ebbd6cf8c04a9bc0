#include "linear_bias.cuh"

template void fastllm::cuda::gemm::linear_bias<cutlass::half_t>(const fastllm::LinearBias&, void*);
