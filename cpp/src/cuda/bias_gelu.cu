#include <algorithm>

#include "bias_gelu.cuh"
#include "column_sums_launch.cuh"
#include "fastllm/bias_gelu.hpp"
#include "launch.hpp"

namespace fastllm::cuda {
namespace {

constexpr std::int64_t kMaxGridY = 65535;

template <int kWidth>
dim3 grid_for(std::int64_t cols, std::int64_t row_blocks) {
    return {blocks_of(cols / kWidth, kBiasGeluThreads), static_cast<unsigned>(row_blocks)};
}

template <class T, int kWidth>
void launch_fwd(const BiasGeluFwd& a, void* stream) {
    const auto bias_gelu_fwd = &bias_gelu_fwd_kernel<T, kWidth>;
    // A few rows per thread, so that the bias is not half of what is read.
    const std::int64_t row_blocks = std::clamp<std::int64_t>(a.rows / 4, 1, kMaxGridY);
    FASTLLM_LAUNCH(bias_gelu_fwd, grid_for<kWidth>(a.cols, row_blocks), dim3(kBiasGeluThreads),
                   stream, static_cast<const T*>(a.x), static_cast<const T*>(a.bias),
                   static_cast<T*>(a.y), a.rows, static_cast<int>(a.cols));
    check(cudaGetLastError(), "bias_gelu_fwd");
}

template <class T, int kWidth>
void launch_bwd(const BiasGeluBwd& a, void* stream) {
    const auto bias_gelu_bwd = &bias_gelu_bwd_kernel<T, kWidth>;
    FASTLLM_LAUNCH(bias_gelu_bwd, grid_for<kWidth>(a.cols, a.parts), dim3(kBiasGeluThreads), stream,
                   static_cast<const T*>(a.dy), static_cast<const T*>(a.x),
                   static_cast<const T*>(a.bias), static_cast<T*>(a.dx), a.partial, a.rows,
                   static_cast<int>(a.cols));
    check(cudaGetLastError(), "bias_gelu_bwd");
    launch_column_sums<T, kWidth>(a.partial, a.dbias, a.parts, a.cols, stream);
}

template <class T>
void fwd(const BiasGeluFwd& a, void* stream) {
    if (!packs_fit<T>(a.cols, {a.x, a.bias, a.y})) return launch_fwd<T, 1>(a, stream);
    launch_fwd<T, kPackWidth<T>>(a, stream);
}

template <class T>
void bwd(const BiasGeluBwd& a, void* stream) {
    const bool fit = packs_fit<T>(a.cols, {a.dy, a.x, a.bias, a.dx, a.partial});
    if (!fit) return launch_bwd<T, 1>(a, stream);
    launch_bwd<T, kPackWidth<T>>(a, stream);
}

}  // namespace

void bias_gelu_fwd(const BiasGeluFwd& args, void* stream) {
    if (args.rows == 0) return;
    with_element_type(args.dtype, [&](auto zero) { fwd<decltype(zero)>(args, stream); });
}

void bias_gelu_bwd(const BiasGeluBwd& args, void* stream) {
    with_element_type(args.dtype, [&](auto zero) { bwd<decltype(zero)>(args, stream); });
}

std::int64_t bias_gelu_bwd_parts(std::int64_t rows, std::int64_t cols) {
    // Blocks divide the columns too, so narrow tensors need more parts than norms do.
    const std::int64_t per_row = std::max<std::int64_t>(1, cols / (8 * kBiasGeluThreads));
    const std::int64_t wanted = std::max<std::int64_t>(1, 4 * multiprocessors() / per_row);
    return std::clamp<std::int64_t>((rows + 15) / 16, 1, std::min(wanted, kMaxGridY));
}

}  // namespace fastllm::cuda
