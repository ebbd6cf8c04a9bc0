#include <cutlass/epilogue/thread/linear_combination.h>
#include <cutlass/gemm/device/gemm_grouped.h>
#include <cutlass/gemm/kernel/default_gemm_grouped.h>
#include <cutlass/gemm/kernel/gemm_grouped.h>

#include <algorithm>

#include "../launch.hpp"
#include "grouped_workspace.hpp"
#include "tile.cuh"

namespace fastllm::cuda::gemm {

template <class T>
void grouped_linear(const GroupedLinear& a, void* stream) {
    using Epilogue = cutlass::epilogue::thread::LinearCombination<T, kVector, float, float>;
    using Kernel = typename cutlass::gemm::kernel::DefaultGemmGrouped<
        T, RowMajor, cutlass::ComplexTransform::kNone, kVector, T, ColumnMajor,
        cutlass::ComplexTransform::kNone, kVector, T, RowMajor, float, TensorOp, Sm80, BlockTile,
        WarpTile, Mma, Epilogue, cutlass::gemm::threadblock::GemmBatchedIdentityThreadblockSwizzle,
        kStages, cutlass::gemm::kernel::GroupScheduleMode::kDeviceOnly>::GemmKernel;
    using Gemm = cutlass::gemm::device::GemmGrouped<Kernel>;
    static_assert(sizeof(cutlass::gemm::GemmCoord) == 3 * sizeof(int));
    const GroupedWorkspace w(a.workspace, a.groups);
    fill_grouped_workspace(a, w, stream);
    // Each block takes tiles in turn, so as many as there are multiprocessors do.
    const std::int64_t tiles = ((a.m + 127) / 128 + a.groups) * ((a.n + 127) / 128);
    const auto blocks = static_cast<int>(std::min<std::int64_t>(tiles, multiprocessors()));
    const typename Gemm::Arguments arguments(
        reinterpret_cast<cutlass::gemm::GemmCoord*>(w.sizes), static_cast<int>(a.groups), blocks,
        {1.0f, 0.0f}, reinterpret_cast<T**>(w.x), reinterpret_cast<T**>(w.w),
        reinterpret_cast<T**>(w.y), reinterpret_cast<T**>(w.y), w.leading_x, w.leading_x,
        w.leading_y, w.leading_y, nullptr);
    run<Gemm>(arguments, nullptr, stream, "grouped_linear");
}

}  // namespace fastllm::cuda::gemm
