#include "cross_entropy.cuh"
#include "fastllm/cross_entropy.hpp"
#include "launch.hpp"

namespace fastllm::cuda {
namespace {

// Accesses per thread before a row gets more threads.
constexpr int kPacksPerThread = 4;

template <class T, int kWidth>
void launch_fwd(const CrossEntropyFwd& a, const RowLayout& layout, void* stream) {
    const auto cross_entropy_fwd = &cross_entropy_fwd_kernel<T, kWidth>;
    FASTLLM_LAUNCH(cross_entropy_fwd, dim3(blocks_for(a.rows, layout)),
                   dim3(layout.threads_per_row, layout.rows_per_block), stream,
                   static_cast<const T*>(a.logits), a.labels, a.max, a.sum, a.target, a.rows,
                   static_cast<int>(a.cols), a.first, a.ignore, a.merge);
    check(cudaGetLastError(), "cross_entropy_fwd");
}

template <class T, int kWidth>
void launch_loss(const CrossEntropyLoss& a, const RowLayout& layout, void* stream) {
    const auto cross_entropy_loss = &cross_entropy_loss_kernel<T, kWidth>;
    FASTLLM_LAUNCH(cross_entropy_loss, dim3(blocks_for(a.rows, layout)),
                   dim3(layout.threads_per_row, layout.rows_per_block), stream,
                   static_cast<const T*>(a.logits), a.labels, a.lse, a.loss, a.rows,
                   static_cast<int>(a.cols), a.ignore);
    check(cudaGetLastError(), "cross_entropy_loss");
}

template <class T, int kWidth>
void launch_bwd(const CrossEntropyBwd& a, const RowLayout& layout, void* stream) {
    const auto cross_entropy_bwd = &cross_entropy_bwd_kernel<T, kWidth>;
    FASTLLM_LAUNCH(cross_entropy_bwd, dim3(blocks_for(a.rows, layout)),
                   dim3(layout.threads_per_row, layout.rows_per_block), stream,
                   static_cast<const T*>(a.logits), a.labels, a.lse, a.dloss,
                   static_cast<T*>(a.dlogits), a.rows, static_cast<int>(a.cols), a.first, a.ignore);
    check(cudaGetLastError(), "cross_entropy_bwd");
}

template <class T>
void fwd(const CrossEntropyFwd& a, void* stream) {
    const RowLayout layout =
        row_layout(a.dtype, a.cols, aligned16({a.logits}), kPacksPerThread, kCrossEntropyThreads);
    if (layout.width == 1) return launch_fwd<T, 1>(a, layout, stream);
    launch_fwd<T, kPackWidth<T>>(a, layout, stream);
}

template <class T>
void loss(const CrossEntropyLoss& a, void* stream) {
    const RowLayout layout =
        row_layout(a.dtype, a.cols, aligned16({a.logits}), kPacksPerThread, kCrossEntropyThreads);
    if (layout.width == 1) return launch_loss<T, 1>(a, layout, stream);
    launch_loss<T, kPackWidth<T>>(a, layout, stream);
}

template <class T>
void bwd(const CrossEntropyBwd& a, void* stream) {
    const RowLayout layout = row_layout(a.dtype, a.cols, aligned16({a.logits, a.dlogits}),
                                        kPacksPerThread, kCrossEntropyThreads);
    if (layout.width == 1) return launch_bwd<T, 1>(a, layout, stream);
    launch_bwd<T, kPackWidth<T>>(a, layout, stream);
}

}  // namespace

void cross_entropy_fwd(const CrossEntropyFwd& args, void* stream) {
    if (args.rows == 0) return;
    with_element_type(args.dtype, [&](auto zero) { fwd<decltype(zero)>(args, stream); });
}

void cross_entropy_loss(const CrossEntropyLoss& args, void* stream) {
    if (args.rows == 0) return;
    with_element_type(args.dtype, [&](auto zero) { loss<decltype(zero)>(args, stream); });
}

void cross_entropy_bwd(const CrossEntropyBwd& args, void* stream) {
    if (args.rows == 0) return;
    with_element_type(args.dtype, [&](auto zero) { bwd<decltype(zero)>(args, stream); });
}

}  // namespace fastllm::cuda
