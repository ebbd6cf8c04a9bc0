// What this build of the native core contains.
#pragma once

#include <string>
#include <vector>

namespace fastllm {

struct BuildInfo {
    std::string version;                    // of the fastllm-core distribution
    std::string compiler;                   // name and version
    bool cuda;                              // compiled with CUDA kernels
    std::vector<std::string> cuda_archs;    // e.g. {"80", "90"}; empty without CUDA
    std::string cuda_version;               // of the toolkit, e.g. "13.0.88"; empty without CUDA
    std::string cutlass_version;            // e.g. "4.2.0"; empty without the products of gemm.hpp
    bool openmp;                            // compiled with OpenMP
    bool sanitized;                         // compiled with AddressSanitizer
    std::vector<std::string> cpu_built;     // vector levels that the operators were compiled for
    std::vector<std::string> cpu_features;  // instruction sets that this machine's CPU has
};

BuildInfo build_info();

}  // namespace fastllm
