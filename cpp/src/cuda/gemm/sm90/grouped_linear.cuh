#pragma once

#include <cutlass/gemm/group_array_problem_shape.hpp>

#include "../grouped_workspace.hpp"
#include "product.cuh"

namespace fastllm::cuda::gemm {
namespace sm90 {

// Each block has tensor maps of its own in global memory, which it rewrites from one group to the
// next.
template <class T>
struct Grouped {
    using Shape = cute::Shape<int, int, int>;
    using Fusion = cutlass::epilogue::fusion::LinearCombination<T, float, void>;
    using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        Sm90, TensorOp, Tile, Cluster, EpilogueTile, float, float, void, RowMajor*, kVectorOf<void>,
        T, RowMajor*, kVector, cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative,
        Fusion>::CollectiveOp;
    using Stages = cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
        sizeof(typename Epilogue::SharedStorage))>;
    using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        Sm90, TensorOp, T, RowMajor*, kVector, T, ColumnMajor*, kVector, float, Tile, Cluster,
        Stages, cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative>::CollectiveOp;
    using Kernel = cutlass::gemm::kernel::GemmUniversal<cutlass::gemm::GroupProblemShape<Shape>,
                                                        Mainloop, Epilogue>;
    using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
    // The workspace has the groups' strides as one number each, of the dimension that is not 1.
    using Stride = typename Kernel::InternalStrideA;
    static_assert(std::is_same_v<Stride, typename Kernel::InternalStrideB> &&
                  std::is_same_v<Stride, typename Kernel::InternalStrideD> &&
                  sizeof(Stride) == sizeof(std::int64_t) && sizeof(Shape) == 3 * sizeof(int));

    static typename Gemm::Arguments arguments(const GroupedWorkspace& w, std::int64_t groups) {
        const auto in = [](void** matrices) {
            return const_cast<const T**>(reinterpret_cast<T**>(matrices));
        };
        typename Gemm::Arguments made{
            cutlass::gemm::GemmUniversalMode::kGrouped,
            {static_cast<int>(groups), reinterpret_cast<Shape*>(w.sizes), nullptr},
            {in(w.x), reinterpret_cast<Stride*>(w.leading_x), in(w.w),
             reinterpret_cast<Stride*>(w.leading_x)},
            {{},
             nullptr,
             nullptr,
             reinterpret_cast<T**>(w.y),
             reinterpret_cast<Stride*>(w.leading_y)}};
        made.hw_info.sm_count = multiprocessors();
        return made;
    }
};

}  // namespace sm90

template <class T>
std::size_t grouped_tensor_map_bytes_sm90(std::int64_t groups) {
    using Grouped = sm90::Grouped<T>;
    return Grouped::Gemm::get_workspace_size(
        Grouped::arguments(GroupedWorkspace(nullptr, groups), groups));
}

template <class T>
void grouped_linear_sm90(const GroupedLinear& a, void* stream) {
    using Grouped = sm90::Grouped<T>;
    const GroupedWorkspace w(a.workspace, a.groups);
    fill_grouped_workspace(a, w, stream);
    run<typename Grouped::Gemm>(Grouped::arguments(w, a.groups), w.tensor_maps(a.groups), stream,
                                "grouped_linear");
}

}  // namespace fastllm::cuda::gemm
