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

#include "../../launch.hpp"
#include "../tile.cuh"

namespace fastllm::cuda::gemm::sm90 {

using Sm90 = cutlass::arch::Sm90;
using Tile = cute::Shape<cute::_128, cute::_128, cute::_64>;
using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
using Problem = cute::Shape<int, int, int, int>;  // m, n, k, batches
using EpilogueTile = cutlass::epilogue::collective::EpilogueTileAuto;
using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecializedCooperative;

template <class T>
inline constexpr int kVectorOf = 16 / static_cast<int>(sizeof(T));
template <>
inline constexpr int kVectorOf<void> = 1;

// d (m, n) of Output, row-major, from a (m, k) and b (k, n) of T with float32 accumulation and what
// `Fusion` does at the end, which may read c (m, n) of Source. By default a is row-major and b is
// the transpose of a row-major w (n, k).
template <class T, class Source, class Output, class Fusion, class LayoutA = RowMajor,
          class LayoutB = ColumnMajor>
struct Product {
    using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        Sm90, TensorOp, Tile, Cluster, EpilogueTile, float, float, Source, RowMajor,
        kVectorOf<Source>, Output, RowMajor, kVectorOf<Output>, EpilogueSchedule,
        Fusion>::CollectiveOp;
    using Stages = cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
        sizeof(typename Epilogue::SharedStorage))>;
    using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        Sm90, TensorOp, T, LayoutA, kVector, T, LayoutB, kVector, float, Tile, Cluster, Stages,
        cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
    using Kernel = cutlass::gemm::kernel::GemmUniversal<Problem, Mainloop, Epilogue>;
    using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
};

// Of a dense row-major matrix with `cols` columns, or of its transpose; one in the batch.
template <class Stride>
Stride dense(std::int64_t cols) {
    Stride stride{};
    if constexpr (cute::is_static_v<cute::remove_cvref_t<decltype(cute::get<0>(stride))>>) {
        cute::get<1>(stride) = cols;
    } else {
        cute::get<0>(stride) = cols;
    }
    return stride;
}

// The problem and operands of d (m, n) = a (m, k) b (k, n), with `cols_a` and `cols_b` columns of
// the row-major matrices that a and b are or are the transposes of.
template <class Gemm, class T>
typename Gemm::Arguments arguments(std::int64_t m, std::int64_t n, std::int64_t k, const void* a,
                                   std::int64_t cols_a, const void* b, std::int64_t cols_b) {
    using Kernel = typename Gemm::GemmKernel;
    typename Gemm::Arguments made{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {static_cast<int>(m), static_cast<int>(n), static_cast<int>(k), 1},
        {static_cast<const T*>(a), dense<typename Kernel::StrideA>(cols_a),
         static_cast<const T*>(b), dense<typename Kernel::StrideB>(cols_b)},
        {}};
    made.hw_info.sm_count = multiprocessors();
    return made;
}

}  // namespace fastllm::cuda::gemm::sm90
