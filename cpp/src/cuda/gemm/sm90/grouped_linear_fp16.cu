#include "grouped_linear.cuh"

template void fastllm::cuda::gemm::grouped_linear_sm90<cutlass::half_t>(
    const fastllm::GroupedLinear&, void*);
