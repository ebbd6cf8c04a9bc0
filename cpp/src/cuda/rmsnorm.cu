#include <algorithm>

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

    const auto rmsnorm_bwd_reduce = &rmsnorm_bwd_reduce_kernel<T, kWidth>;
    const dim3 reduce_grid(static_cast<unsigned>((a.cols + kWarp - 1) / kWarp));
    FASTLLM_LAUNCH(rmsnorm_bwd_reduce, reduce_grid, dim3(kWarp, kReduceLanes), stream, a.partial,
                   static_cast<T*>(a.dweight), static_cast<int>(a.parts), static_cast<int>(a.cols));
    check(cudaGetLastError(), "rmsnorm_bwd, sum of weight gradients");
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
    switch (args.dtype) {
        case DType::kFloat32:
            return fwd<float>(args, stream);
        case DType::kBFloat16:
            return fwd<__nv_bfloat16>(args, stream);
        case DType::kFloat16:
            return fwd<__half>(args, stream);
    }
}

void rmsnorm_bwd(const RmsNormBwd& args, void* stream) {
    switch (args.dtype) {
        case DType::kFloat32:
            return bwd<float>(args, stream);
        case DType::kBFloat16:
            return bwd<__nv_bfloat16>(args, stream);
        case DType::kFloat16:
            return bwd<__half>(args, stream);
    }
}

std::int64_t rmsnorm_bwd_parts(std::int64_t rows, std::int64_t cols) {
    // Enough blocks to fill the device, but 16 rows or more in each beyond one per multiprocessor,
    // since every part's sums are written and read once more. A multiple of 4: with one warp per
    // row, a block holds four parts.
    const std::int64_t sms = multiprocessors();
    const std::int64_t per_sm = cols <= 1024 ? 16 : cols <= 4096 ? 4 : 2;
    const std::int64_t parts =
        std::min(sms * per_sm, std::max((rows + 15) / 16, std::min(rows, sms)));
    return std::max<std::int64_t>(4, (parts + 3) / 4 * 4);
}

}  // namespace fastllm::cuda
