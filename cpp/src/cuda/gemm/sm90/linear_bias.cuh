#include "../../launch.hpp"
#include "product.cuh"

namespace fastllm::cuda::gemm {

template <class T>
void linear_bias_sm90(const LinearBias& a, void* stream) {
    using Fusion = cutlass::epilogue::fusion::LinCombPerColBias<T, float, T>;
    using Gemm = typename sm90::Product<T, Fusion>::Gemm;
    using Kernel = typename Gemm::GemmKernel;
    typename Gemm::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {static_cast<int>(a.m), static_cast<int>(a.n), static_cast<int>(a.k), 1},
        {static_cast<const T*>(a.x), sm90::row_major<typename Kernel::StrideA>(a.k),
         static_cast<const T*>(a.w), sm90::row_major<typename Kernel::StrideB>(a.k)},
        {{}, nullptr, {}, static_cast<T*>(a.y), sm90::row_major<typename Kernel::StrideD>(a.n)}};
    arguments.epilogue.thread.bias_ptr = static_cast<const T*>(a.bias);  // null: zeros
    arguments.hw_info.sm_count = multiprocessors();
    run<Gemm>(arguments, nullptr, stream, "linear_bias");
}

}  // namespace fastllm::cuda::gemm
