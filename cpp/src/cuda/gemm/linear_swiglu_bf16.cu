#include "linear_swiglu.cuh"

template void fastllm::cuda::gemm::linear_swiglu<cutlass::bfloat16_t>(const fastllm::LinearSwiglu&,
                                                                      void*);
