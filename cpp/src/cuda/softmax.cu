#include "fastllm/softmax.hpp"
#include "launch.hpp"
#include "softmax.cuh"

namespace fastllm::cuda {
namespace {

template <class T, int kWidth>
void launch_fwd(const SoftmaxFwd& a, const RowLayout& layout, void* stream) {
    const auto softmax_fwd = &softmax_fwd_kernel<T, kWidth>;
    FASTLLM_LAUNCH(softmax_fwd, dim3(blocks_for(a.batch * a.heads * a.queries, layout)),
                   dim3(layout.threads_per_row, layout.rows_per_block), stream,
                   static_cast<const T*>(a.x), static_cast<T*>(a.y), a);
    check(cudaGetLastError(), "softmax_fwd");
}

template <class T>
void fwd(const SoftmaxFwd& a, void* stream) {
    const RowLayout layout =
        row_layout(a.dtype, a.cols, aligned16({a.x, a.y}), kSoftmaxPacks, kSoftmaxThreads);
    if (layout.width == 1) return launch_fwd<T, 1>(a, layout, stream);
    launch_fwd<T, kPackWidth<T>>(a, layout, stream);
}

template <class T, int kWidth>
void launch_bwd(const SoftmaxBwd& a, const RowLayout& layout, void* stream) {
    const auto softmax_bwd = &softmax_bwd_kernel<T, kWidth>;
    FASTLLM_LAUNCH(softmax_bwd, dim3(blocks_for(a.rows, layout)),
                   dim3(layout.threads_per_row, layout.rows_per_block), stream,
                   static_cast<const T*>(a.dy), static_cast<const T*>(a.y), static_cast<T*>(a.dx),
                   a.rows, a.queries, static_cast<int>(a.cols), a.scale, a.causal);
    check(cudaGetLastError(), "softmax_bwd");
}

template <class T>
void bwd(const SoftmaxBwd& a, void* stream) {
    const RowLayout layout =
        row_layout(a.dtype, a.cols, aligned16({a.dy, a.y, a.dx}), kSoftmaxPacks, kSoftmaxThreads);
    if (layout.width == 1) return launch_bwd<T, 1>(a, layout, stream);
    launch_bwd<T, kPackWidth<T>>(a, layout, stream);
}

}  // namespace

void softmax_fwd(const SoftmaxFwd& args, void* stream) {
    if (args.batch * args.heads * args.queries == 0) return;
    with_element_type(args.dtype, [&](auto zero) { fwd<decltype(zero)>(args, stream); });
}

void softmax_bwd(const SoftmaxBwd& args, void* stream) {
    if (args.rows == 0) return;
    with_element_type(args.dtype, [&](auto zero) { bwd<decltype(zero)>(args, stream); });
}

}  // namespace fastllm::cuda
