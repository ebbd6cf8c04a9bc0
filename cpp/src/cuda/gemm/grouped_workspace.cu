#include "../launch.hpp"
#include "grouped_workspace.hpp"

namespace fastllm::cuda::gemm {
namespace {

constexpr int kThreads = 128;

__global__ void grouped_workspace_kernel(GroupedLinear a, GroupedWorkspace to) {
    const std::int64_t g = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (g >= a.groups) return;
    const std::int64_t begin = a.offsets[g];
    const std::int64_t end = a.offsets[g + 1];
    constexpr std::int64_t kBytes = 2;  // of bfloat16 and float16
    const auto at = [](const void* base, std::int64_t elements) {
        return const_cast<char*>(static_cast<const char*>(base)) + elements * kBytes;
    };
    to.x[g] = at(a.x, begin * a.k);
    to.w[g] = at(a.w, g * a.n * a.k);
    to.y[g] = at(a.y, begin * a.n);
    to.leading_x[g] = a.k;
    to.leading_y[g] = a.n;
    to.sizes[3 * g] = static_cast<int>(end - begin);
    to.sizes[3 * g + 1] = static_cast<int>(a.n);
    to.sizes[3 * g + 2] = static_cast<int>(a.k);
}

}  // namespace

void fill_grouped_workspace(const GroupedLinear& args, const GroupedWorkspace& workspace,
                            void* stream) {
    grouped_workspace_kernel<<<blocks_of(args.groups, kThreads), kThreads, 0,
                               static_cast<cudaStream_t>(stream)>>>(args, workspace);
    check(cudaGetLastError(), "grouped_linear, sizes of the groups");
}

}  // namespace fastllm::cuda::gemm
