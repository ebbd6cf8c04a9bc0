#include "fastllm/build_info.hpp"

#include <sstream>

namespace fastllm {
namespace {

std::vector<std::string> cpu_features() {
    std::vector<std::string> found;
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("sse4.2")) found.emplace_back("sse4.2");
    if (__builtin_cpu_supports("avx2")) found.emplace_back("avx2");
    if (__builtin_cpu_supports("fma")) found.emplace_back("fma");
    if (__builtin_cpu_supports("avx512f")) found.emplace_back("avx512f");
    if (__builtin_cpu_supports("avx512bf16")) found.emplace_back("avx512bf16");
#elif defined(__aarch64__)
    found.emplace_back("neon");
#endif
    return found;
}

std::vector<std::string> split_commas(const std::string& text) {
    std::vector<std::string> parts;
    std::istringstream stream(text);
    for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
    return parts;
}

}  // namespace

BuildInfo build_info() {
    BuildInfo info;
    info.version = FASTLLM_VERSION;
#if defined(__clang__)
    info.compiler = "clang " __clang_version__;
#else
    info.compiler = "g++ " __VERSION__;
#endif
    info.cuda = FASTLLM_WITH_CUDA != 0;
    if (info.cuda) info.cuda_archs = split_commas(FASTLLM_CUDA_ARCHITECTURES);
    info.cuda_version = FASTLLM_CUDA_VERSION;
    info.cutlass_version = FASTLLM_CUTLASS_VERSION;
    info.openmp = FASTLLM_WITH_OPENMP != 0;
#if defined(__SANITIZE_ADDRESS__)
    info.sanitized = true;
#else
    info.sanitized = false;
#endif
    info.cpu_built = split_commas(FASTLLM_CPU_LEVELS);
    info.cpu_features = cpu_features();
    return info;
}

}  // namespace fastllm
