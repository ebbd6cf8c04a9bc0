#include "linear_swiglu.cuh"

template void fastllm::cuda::gemm::linear_swiglu_sm90<cutlass::half_t>(const fastllm::LinearSwiglu&,
                                                                       void*);
