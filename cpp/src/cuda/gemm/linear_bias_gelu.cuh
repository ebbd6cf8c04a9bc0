#include <cutlass/epilogue/thread/activation.h>
#include <cutlass/epilogue/thread/linear_combination_bias_elementwise.h>
#include <cutlass/gemm/device/gemm_universal_with_broadcast.h>

#include "tile.cuh"

namespace fastllm::cuda::gemm {

template <class T>
void linear_bias_gelu(const LinearBiasGelu& a, void* stream) {
    using Gelu = cutlass::epilogue::thread::GELU_taylor<float>;
    using Epilogue = cutlass::epilogue::thread::LinearCombinationBiasElementwise<
        T, float, float, T, T, kVector, Gelu, cutlass::plus<float>, true, T>;
    using Gemm = cutlass::gemm::device::GemmUniversalWithBroadcast<
        T, RowMajor, T, ColumnMajor, T, RowMajor, float, TensorOp, Sm80, BlockTile, WarpTile, Mma,
        Epilogue, Swizzle, kStages, kVector, kVector>;
    const auto m = static_cast<int>(a.m);
    const auto n = static_cast<int>(a.n);
    const auto k = static_cast<int>(a.k);
    const typename Gemm::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                                             {m, n, k},
                                             1,
                                             {1.0f, 0.0f},
                                             a.x,
                                             a.w,
                                             nullptr,
                                             a.y,
                                             const_cast<void*>(a.bias),
                                             a.pre,
                                             a.m * a.k,
                                             a.n * a.k,
                                             std::int64_t{0},
                                             a.m * a.n,
                                             a.n,
                                             a.m * a.n,
                                             k,
                                             k,
                                             0,
                                             n,
                                             std::int64_t{0},
                                             n};
    run<Gemm>(arguments, nullptr, stream, "linear_bias_gelu");
}

}  // namespace fastllm::cuda::gemm
