#include "fastllm/moe_permute.hpp"
#include "launch.hpp"
#include "moe_permute.cuh"

namespace fastllm::cuda {
namespace {

template <class Args>
RowLayout layout_for(const Args& a, std::initializer_list<const void*> pointers) {
    return row_layout(a.dtype, a.cols, aligned16(pointers), kMoePacks, kMoeThreads);
}

template <class T, int kWidth>
void launch(const MoePermute& a, const RowLayout& layout, void* stream) {
    const auto moe_permute = &moe_permute_kernel<T, kWidth>;
    FASTLLM_LAUNCH(moe_permute, dim3(blocks_for(a.tokens, layout)),
                   dim3(layout.threads_per_row, layout.rows_per_block), stream, a.slots,
                   static_cast<const T*>(a.x), static_cast<T*>(a.y), a.tokens,
                   static_cast<int>(a.choices), a.places, static_cast<int>(a.cols));
    check(cudaGetLastError(), "moe_permute");
}

template <class T, int kWidth>
void launch(const MoeCombine& a, const RowLayout& layout, void* stream) {
    const auto moe_combine = &moe_combine_kernel<T, kWidth>;
    FASTLLM_LAUNCH(moe_combine, dim3(blocks_for(a.tokens, layout)),
                   dim3(layout.threads_per_row, layout.rows_per_block), stream, a.slots, a.weights,
                   static_cast<const T*>(a.y), static_cast<T*>(a.out), a.tokens,
                   static_cast<int>(a.choices), a.places, static_cast<int>(a.cols));
    check(cudaGetLastError(), "moe_combine");
}

template <class T, int kWidth>
void launch(const MoeCombineBwd& a, const RowLayout& layout, void* stream) {
    const auto moe_combine_bwd = &moe_combine_bwd_kernel<T, kWidth>;
    FASTLLM_LAUNCH(moe_combine_bwd, dim3(blocks_for(a.tokens, layout)),
                   dim3(layout.threads_per_row, layout.rows_per_block), stream, a.slots, a.weights,
                   static_cast<const T*>(a.dout), static_cast<const T*>(a.y), static_cast<T*>(a.dy),
                   a.dweights, a.tokens, static_cast<int>(a.choices), a.places,
                   static_cast<int>(a.cols));
    check(cudaGetLastError(), "moe_combine_bwd");
}

template <class Args>
void run(const Args& args, std::initializer_list<const void*> rows, void* stream) {
    if (args.tokens == 0) return;
    const RowLayout layout = layout_for(args, rows);
    with_element_type(args.dtype, [&](auto zero) {
        using T = decltype(zero);
        if (layout.width == 1) return launch<T, 1>(args, layout, stream);
        launch<T, kPackWidth<T>>(args, layout, stream);
    });
}

}  // namespace

void moe_permute(const MoePermute& args, void* stream) { run(args, {args.x, args.y}, stream); }

void moe_combine(const MoeCombine& args, void* stream) { run(args, {args.y, args.out}, stream); }

void moe_combine_bwd(const MoeCombineBwd& args, void* stream) {
    run(args, {args.dout, args.y, args.dy}, stream);
}

}  // namespace fastllm::cuda
