#include <cutlass/epilogue/thread/linear_combination.h>
#include <cutlass/gemm/device/gemm_universal.h>

#include "tile.cuh"

namespace fastllm::cuda::gemm {

template <class T>
void linear_weight_grad(const LinearWeightGrad& a, void* stream) {
    using Epilogue = cutlass::epilogue::thread::LinearCombination<float, 4, float, float>;
    using Gemm =
        cutlass::gemm::device::GemmUniversal<T, ColumnMajor, T, RowMajor, float, RowMajor, float,
                                             TensorOp, Sm80, BlockTile, WarpTile, Mma, Epilogue,
                                             Swizzle, kStages, kVector, kVector>;
    const auto m = static_cast<int>(a.m);
    const auto n = static_cast<int>(a.n);
    const auto k = static_cast<int>(a.k);
    const typename Gemm::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                                             {n, k, m},
                                             1,
                                             {1.0f, 1.0f},
                                             a.dy,
                                             a.x,
                                             a.dw,
                                             a.dw,
                                             a.m * a.n,
                                             a.m * a.k,
                                             a.n * a.k,
                                             a.n * a.k,
                                             n,
                                             k,
                                             k,
                                             k};
    run<Gemm>(arguments, nullptr, stream, "linear_weight_grad");
}

}  // namespace fastllm::cuda::gemm
