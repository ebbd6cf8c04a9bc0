// What the sm_90a instances share: warp-specialised kernels of CUTLASS 3.x, which load by TMA and
// multiply by wgmma. Compiled for sm_90a alone, run where the device is one (gemm.cu).
//
// Clusters of one block, so that what is emulated is what runs on a GPU.
#pragma once

#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "../tile.cuh"

namespace fastllm::cuda::gemm::sm90 {

using Sm90 = cutlass::arch::Sm90;
using Tile = cute::Shape<cute::_128, cute::_128, cute::_64>;
using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
using Problem = cute::Shape<int, int, int, int>;  // m, n, k, batches

// y (m, n) of T from x (m, k) and w (n, k) of T, all row-major, with float32 accumulation and what
// `Fusion` does at the end.
template <class T, class Fusion>
struct Product {
    using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        Sm90, TensorOp, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float,
        float, void, RowMajor, kVector, T, RowMajor, kVector,
        cutlass::epilogue::TmaWarpSpecializedCooperative, Fusion>::CollectiveOp;
    using Stages = cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
        sizeof(typename Epilogue::SharedStorage))>;
    using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        Sm90, TensorOp, T, RowMajor, kVector, T, ColumnMajor, kVector, float, Tile, Cluster, Stages,
        cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
    using Kernel = cutlass::gemm::kernel::GemmUniversal<Problem, Mainloop, Epilogue>;
    using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
};

// Of a dense row-major matrix with `cols` columns, one in the batch.
template <class Stride>
Stride row_major(std::int64_t cols) {
    Stride stride{};
    cute::get<0>(stride) = cols;
    return stride;
}

}  // namespace fastllm::cuda::gemm::sm90
