#include "grouped_linear.cuh"

template void fastllm::cuda::gemm::grouped_linear_sm90<cutlass::bfloat16_t>(
    const fastllm::GroupedLinear&, void*);
// The same for float16.
template std::size_t fastllm::cuda::gemm::grouped_tensor_map_bytes_sm90<cutlass::bfloat16_t>(
    std::int64_t);
