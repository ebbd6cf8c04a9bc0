// Two launches: gate = x wg^T is linear_bias's kernel without a bias; that of up = x wu^T has gate
// for its source and ends with y = silu(gate) * up. A kernel of both products would need a main
// loop of its own (CUTLASS has none for sm_90a); what this one costs is that x is read twice and
// gate once more.
#pragma once

#include <cutlass/epilogue/thread/activation.h>

#include "product.cuh"

namespace fastllm::cuda::gemm {
namespace sm90 {

namespace fusion = cutlass::epilogue::fusion;
namespace thread = cutlass::epilogue::thread;

template <template <class> class Function, class Output>
using Compute =
    fusion::Sm90Compute<Function, Output, float, cutlass::FloatRoundStyle::round_to_nearest>;

// silu(c) * up, where up is the accumulators rounded to T, which it stores.
template <class T>
struct SiluTimes {
    using Descriptor =
        cutlass::epilogue::collective::detail::EpilogueDescriptor<Tile, EpilogueTile, T, T,
                                                                  EpilogueSchedule>;
    using Store =
        cutlass::epilogue::collective::detail::AuxStoreDescriptor<Descriptor, RowMajor, T>;
    using Silu = fusion::Sm90EVT<Compute<thread::SiLu, float>, fusion::Sm90SrcFetch<T>>;
    using Up = fusion::Sm90EVT<
        fusion::Sm90AuxStore<Store::Stages, typename Store::EpilogueTile, T,
                             cutlass::FloatRoundStyle::round_to_nearest, typename Store::Stride,
                             typename Store::SmemLayoutAtom, typename Store::CopyOpR2S>,
        fusion::Sm90EVT<Compute<thread::Identity, T>, fusion::Sm90AccFetch>>;
    using Fusion = fusion::Sm90EVT<Compute<cutlass::multiplies, T>, Silu, Up>;

    static typename Fusion::Arguments arguments(T* up, std::int64_t cols) {
        return {{}, {{}, {up, dense<typename Store::Stride>(cols)}}, {}};
    }
};

}  // namespace sm90

template <class T>
void linear_swiglu_sm90(const LinearSwiglu& a, void* stream) {
    using Fusion = sm90::SiluTimes<T>;
    using Gemm = typename sm90::Product<T, T, T, typename Fusion::Fusion>::Gemm;
    linear_bias_sm90<T>({a.dtype, a.m, a.n, a.k, a.x, a.wg, nullptr, a.gate}, stream);
    auto arguments = sm90::arguments<Gemm, T>(a.m, a.n, a.k, a.x, a.k, a.wu, a.k);
    const auto dense = sm90::dense<typename Gemm::GemmKernel::StrideD>(a.n);
    arguments.epilogue.thread = Fusion::arguments(static_cast<T*>(a.up), a.n);
    arguments.epilogue.ptr_C = static_cast<const T*>(a.gate);
    arguments.epilogue.ptr_D = static_cast<T*>(a.y);
    arguments.epilogue.dC = arguments.epilogue.dD = dense;
    run<Gemm>(arguments, nullptr, stream, "linear_swiglu");
}

}  // namespace fastllm::cuda::gemm
