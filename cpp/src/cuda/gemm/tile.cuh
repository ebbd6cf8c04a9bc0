// What all instances share, and those of sm_80: tile shapes, layouts, the launch. One instance per
// .cu file.
#pragma once

#include <cutlass/arch/arch.h>
#include <cutlass/arch/mma.h>
#include <cutlass/bfloat16.h>
#include <cutlass/cutlass.h>
#include <cutlass/gemm/gemm.h>
#include <cutlass/gemm/threadblock/threadblock_swizzle.h>
#include <cutlass/half.h>
#include <cutlass/layout/matrix.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "fastllm/gemm.hpp"

namespace fastllm::cuda::gemm {

using RowMajor = cutlass::layout::RowMajor;
using ColumnMajor = cutlass::layout::ColumnMajor;
using TensorOp = cutlass::arch::OpClassTensorOp;
using Sm80 = cutlass::arch::Sm80;
using BlockTile = cutlass::gemm::GemmShape<128, 128, 32>;
using WarpTile = cutlass::gemm::GemmShape<64, 64, 32>;
using Mma = cutlass::gemm::GemmShape<16, 8, 16>;
using Swizzle = cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>;
inline constexpr int kStages = 4;
inline constexpr int kVector = 8;  // elements of one 16-byte access

template <class Gemm>
void run(const typename Gemm::Arguments& arguments, void* workspace, void* stream,
         const char* what) {
    Gemm gemm;
    auto* const on = static_cast<cudaStream_t>(stream);
    cutlass::Status status = gemm.initialize(arguments, workspace, on);
    if (status == cutlass::Status::kSuccess) status = gemm.run(on);
    if (status != cutlass::Status::kSuccess) {
        throw std::runtime_error(std::string(what) + ": " + cutlassGetStatusString(status));
    }
}

// Each defined in the file of its name and dtype; _sm90: in sm90.
template <class T>
void linear_bias(const LinearBias& args, void* stream);
template <class T>
void linear_bias_sm90(const LinearBias& args, void* stream);
template <class T>
void linear_bias_gelu(const LinearBiasGelu& args, void* stream);
template <class T>
void linear_bias_gelu_sm90(const LinearBiasGelu& args, void* stream);
template <class T>
void linear_swiglu(const LinearSwiglu& args, void* stream);
template <class T>
void linear_swiglu_sm90(const LinearSwiglu& args, void* stream);
template <class T>
void linear_weight_grad(const LinearWeightGrad& args, void* stream);
template <class T>
void linear_weight_grad_sm90(const LinearWeightGrad& args, void* stream);
template <class T>
void grouped_linear(const GroupedLinear& args, void* stream);
template <class T>
void grouped_linear_sm90(const GroupedLinear& args, void* stream);
// Beyond GroupedWorkspace::bytes(), for the current device.
template <class T>
std::size_t grouped_tensor_map_bytes_sm90(std::int64_t groups);

}  // namespace fastllm::cuda::gemm
