// The kernel of two products is part of CUTLASS's examples (45_dual_gemm), not of its headers.
#include <cutlass/epilogue/thread/linear_combination.h>
#include <cutlass/gemm/device/gemm.h>
#include <device/dual_gemm.h>
#include <thread/left_silu_and_mul.h>

#include "tile.cuh"

namespace fastllm::cuda::gemm {

template <class T>
void linear_swiglu(const LinearSwiglu& a, void* stream) {
    // Two accumulators are held, so each is half as wide.
    using Tile = cutlass::gemm::GemmShape<128, 64, 32>;
    using Warps = cutlass::gemm::GemmShape<64, 32, 32>;
    using Product = cutlass::epilogue::thread::LinearCombination<
        T, kVector, float, float, cutlass::epilogue::thread::ScaleType::OnlyAlphaScaling>;
    using Swiglu = cutlass::epilogue::thread::LeftSiLUAndMul<T, kVector, T, float>;
    using Gemm = cutlass::gemm::device::DualGemm<T, RowMajor, T, ColumnMajor, ColumnMajor, T,
                                                 RowMajor, float, TensorOp, Sm80, Tile, Warps, Mma,
                                                 Product, Product, Swiglu, Swizzle, 3>;
    const auto m = static_cast<int>(a.m);
    const auto n = static_cast<int>(a.n);
    const auto k = static_cast<int>(a.k);
    const auto in = [](const void* p) { return static_cast<const T*>(p); };
    const auto out = [](void* p) { return static_cast<T*>(p); };
    const typename Gemm::Arguments arguments{cutlass::gemm::DualGemmMode::kGemm,
                                             {m, n, k},
                                             {in(a.x), RowMajor(k)},
                                             {in(a.wg), ColumnMajor(k)},
                                             {nullptr, RowMajor(0)},
                                             {out(a.gate), RowMajor(n)},
                                             {in(a.wu), ColumnMajor(k)},
                                             {nullptr, RowMajor(0)},
                                             {out(a.up), RowMajor(n)},
                                             {out(a.y), RowMajor(n)},
                                             {1.0f, 0.0f},
                                             {1.0f, 0.0f},
                                             {}};
    run<Gemm>(arguments, nullptr, stream, "linear_swiglu");
}

}  // namespace fastllm::cuda::gemm
