#include <cutlass/epilogue/thread/linear_combination.h>
#include <cutlass/gemm/device/gemm_universal.h>

#include "tile.cuh"

namespace fastllm::cuda::gemm {

template <class T>
void linear_bias(const LinearBias& a, void* stream) {
    using Epilogue = cutlass::epilogue::thread::LinearCombination<T, kVector, float, float>;
    using Gemm =
        cutlass::gemm::device::GemmUniversal<T, RowMajor, T, ColumnMajor, T, RowMajor, float,
                                             TensorOp, Sm80, BlockTile, WarpTile, Mma, Epilogue,
                                             Swizzle, kStages, kVector, kVector>;
    const auto m = static_cast<int>(a.m);
    const auto n = static_cast<int>(a.n);
    const auto k = static_cast<int>(a.k);
    // The bias is a matrix whose rows are 0 elements apart.
    const float beta = a.bias != nullptr ? 1.0f : 0.0f;
    const typename Gemm::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                                             {m, n, k},
                                             1,
                                             {1.0f, beta},
                                             a.x,
                                             a.w,
                                             a.bias,
                                             a.y,
                                             a.m * a.k,
                                             a.n * a.k,
                                             0,
                                             a.m * a.n,
                                             k,
                                             k,
                                             0,
                                             n};
    run<Gemm>(arguments, nullptr, stream, "linear_bias");
}

}  // namespace fastllm::cuda::gemm
