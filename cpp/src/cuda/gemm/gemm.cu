// Checks, and the choice of an instance.
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>

#include "../launch.hpp"
#include "fastllm/gemm.hpp"
#include "grouped_workspace.hpp"
#include "tile.cuh"

namespace fastllm::cuda {
namespace {

void require(const char* op, std::int64_t m, std::int64_t n, std::int64_t k,
             std::initializer_list<const void*> pointers) {
    const std::string name = std::string(op) + ": ";
    for (const std::int64_t size : {m, n, k}) {
        if (size < 0 || size > std::numeric_limits<int>::max()) {
            throw std::invalid_argument(name + "a size is negative or over 2^31 - 1");
        }
    }
    if (n == 0 || k == 0 || n % 8 != 0 || k % 8 != 0) {
        throw std::invalid_argument(name + "n is " + std::to_string(n) + " and k " +
                                    std::to_string(k) + ", both must be multiples of 8");
    }
    if (!aligned16(pointers)) {
        throw std::invalid_argument(name + "a tensor is not aligned to 16 bytes");
    }
}

// Whether the current device runs the instances of sm_90a.
bool on_sm90() {
    int device = 0;
    int major = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
          "cudaDeviceGetAttribute");
    return major == 9;
}

#if FASTLLM_GEMM_FP16
#define INSTANCES(function) {function<cutlass::bfloat16_t>, function<cutlass::half_t>}
#else
#define INSTANCES(function) {function<cutlass::bfloat16_t>, nullptr}
#endif

template <class Args>
struct Instances {
    void (*bf16)(const Args&, void*);
    void (*fp16)(const Args&, void*);
};

template <class Args>
void dispatch(const char* op, const Instances<Args>& instances, const Args& args, void* stream) {
    switch (args.dtype) {
        case DType::kBFloat16:
            return instances.bf16(args, stream);
        case DType::kFloat16:
            if (instances.fp16 != nullptr) return instances.fp16(args, stream);
            throw std::invalid_argument(std::string(op) + ": built without float16");
        case DType::kFloat32:
            break;
    }
    throw std::invalid_argument(std::string(op) + ": float32, expected bfloat16 or float16");
}

}  // namespace

void linear_bias(const LinearBias& a, void* stream) {
    require("linear_bias", a.m, a.n, a.k, {a.x, a.w, a.bias, a.y});
    if (a.m == 0) return;
    if (on_sm90()) {
        return dispatch<LinearBias>("linear_bias", INSTANCES(gemm::linear_bias_sm90), a, stream);
    }
    dispatch<LinearBias>("linear_bias", INSTANCES(gemm::linear_bias), a, stream);
}

void linear_bias_gelu(const LinearBiasGelu& a, void* stream) {
    require("linear_bias_gelu", a.m, a.n, a.k, {a.x, a.w, a.bias, a.y, a.pre});
    if (a.m == 0) return;
    if (on_sm90()) {
        return dispatch<LinearBiasGelu>("linear_bias_gelu", INSTANCES(gemm::linear_bias_gelu_sm90),
                                        a, stream);
    }
    dispatch<LinearBiasGelu>("linear_bias_gelu", INSTANCES(gemm::linear_bias_gelu), a, stream);
}

void linear_swiglu(const LinearSwiglu& a, void* stream) {
    require("linear_swiglu", a.m, a.n, a.k, {a.x, a.wg, a.wu, a.gate, a.up, a.y});
    if (a.m == 0) return;
    if (on_sm90()) {
        return dispatch<LinearSwiglu>("linear_swiglu", INSTANCES(gemm::linear_swiglu_sm90), a,
                                      stream);
    }
    dispatch<LinearSwiglu>("linear_swiglu", INSTANCES(gemm::linear_swiglu), a, stream);
}

void linear_weight_grad(const LinearWeightGrad& a, void* stream) {
    require("linear_weight_grad", a.m, a.n, a.k, {a.dy, a.x, a.dw});
    if (a.m == 0) return;
    if (on_sm90()) {
        return dispatch<LinearWeightGrad>("linear_weight_grad",
                                          INSTANCES(gemm::linear_weight_grad_sm90), a, stream);
    }
    dispatch<LinearWeightGrad>("linear_weight_grad", INSTANCES(gemm::linear_weight_grad), a,
                               stream);
}

void grouped_linear(const GroupedLinear& a, void* stream) {
    require("grouped_linear", a.m, a.n, a.k, {a.x, a.w, a.y, a.workspace});
    if (a.m == 0 || a.groups == 0) return;
    if (on_sm90()) {
        return dispatch<GroupedLinear>("grouped_linear", INSTANCES(gemm::grouped_linear_sm90), a,
                                       stream);
    }
    dispatch<GroupedLinear>("grouped_linear", INSTANCES(gemm::grouped_linear), a, stream);
}

std::size_t grouped_workspace_bytes(std::int64_t groups) {
    const std::size_t bytes = gemm::GroupedWorkspace::bytes(groups);
    if (groups == 0 || !on_sm90()) return bytes;
    return bytes + gemm::GroupedWorkspace::kTensorMapAlignment +
           gemm::grouped_tensor_map_bytes_sm90<cutlass::bfloat16_t>(groups);
}

}  // namespace fastllm::cuda
