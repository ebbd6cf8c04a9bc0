#include "column_sums_launch.cuh"
#include "fastllm/rmsnorm.hpp"
#include "launch.hpp"
#include "rmsnorm.cuh"

namespace fastllm::cuda {
namespace {

template <class T, int kWidth>
void launch_fwd(const RmsNormFwd& a, const RowLayout& layout, void* stream) {
    const auto rmsnorm_fwd = &rmsnorm_fwd_kernel<T, kWidth>;
    const dim3 block(layout.threads_per_row, layout.rows_per_block);
    FASTLLM_LAUNCH(
        rmsnorm_fwd, dim3(blocks_for(a.rows, layout)), block, stream, static_cast<const T*>(a.x),
        static_cast<const T*>(a.residual), static_cast<const T*>(a.weight), static_cast<T*>(a.y),
        static_cast<T*>(a.residual_out), a.rstd, a.rows, static_cast<int>(a.cols), a.eps);
    check(cudaGetLastError(), "rmsnorm_fwd");
}

template <class T>
void fwd(const RmsNormFwd& a, void* stream) {
    const bool aligned = aligned16({a.x, a.residual, a.weight, a.y, a.residual_out});
    const RowLayout layout =
        row_layout(a.dtype, a.cols, aligned, kRmsNormPacks, kRmsNormFwdThreads);
    if (layout.width == 1) return launch_fwd<T, 1>(a, layout, stream);
    launch_fwd<T, kPackWidth<T>>(a, layout, stream);
}

template <class T, int kWidth>
void launch_bwd(const RmsNormBwd& a, const RowLayout& layout, void* stream) {
    const auto rmsnorm_bwd = &rmsnorm_bwd_kernel<T, kWidth>;
    const dim3 block(layout.threads_per_row, layout.rows_per_block);
    const dim3 grid(static_cast<unsigned>(a.parts / layout.rows_per_block));
    FASTLLM_LAUNCH(rmsnorm_bwd, grid, block, stream, static_cast<const T*>(a.dy),
                   static_cast<const T*>(a.h), static_cast<const T*>(a.weight), a.rstd,
                   static_cast<const T*>(a.dh), static_cast<T*>(a.dx), a.partial, a.rows,
                   static_cast<int>(a.cols));
    check(cudaGetLastError(), "rmsnorm_bwd");

    launch_column_sums<T, kWidth>(a.partial, a.dweight, a.parts, a.cols, stream);
}

template <class T>
void bwd(const RmsNormBwd& a, void* stream) {
    const bool aligned = aligned16({a.dy, a.h, a.weight, a.dh, a.dx, a.partial});
    const RowLayout layout =
        row_layout(a.dtype, a.cols, aligned, kRmsNormPacks, kRmsNormBwdThreads);
    if (layout.width == 1) return launch_bwd<T, 1>(a, layout, stream);
    launch_bwd<T, kPackWidth<T>>(a, layout, stream);
}

}  // namespace

void rmsnorm_fwd(const RmsNormFwd& args, void* stream) {
    if (args.rows == 0) return;
    with_element_type(args.dtype, [&](auto zero) { fwd<decltype(zero)>(args, stream); });
}

void rmsnorm_bwd(const RmsNormBwd& args, void* stream) {
    with_element_type(args.dtype, [&](auto zero) { bwd<decltype(zero)>(args, stream); });
}

std::int64_t rmsnorm_bwd_parts(std::int64_t rows, std::int64_t cols) {
    return parts_of_rows(rows, cols);
}

}  // namespace fastllm::cuda
