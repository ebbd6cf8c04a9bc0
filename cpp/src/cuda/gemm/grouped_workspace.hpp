// What the grouped product's kernel reads: sizes and addresses of each group, in device memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fastllm/gemm.hpp"

namespace fastllm::cuda::gemm {

struct GroupedWorkspace {
    void** x;
    void** w;
    void** y;
    std::int64_t* leading_x;  // of x and w, whose rows are both k long
    std::int64_t* leading_y;
    int* sizes;  // m, n, k

    // On an sm_90 the tensor maps come behind.
    static constexpr std::size_t kTensorMapAlignment = 128;
    void* tensor_maps(std::int64_t groups) const {
        const auto end = reinterpret_cast<std::uintptr_t>(sizes + 3 * groups);
        return reinterpret_cast<void*>((end + kTensorMapAlignment - 1) / kTensorMapAlignment *
                                       kTensorMapAlignment);
    }
    static std::size_t bytes(std::int64_t groups) {
        return static_cast<std::size_t>(groups) * (5 * sizeof(void*) + 3 * sizeof(int));
    }
    GroupedWorkspace(void* memory, std::int64_t groups)
        : x(static_cast<void**>(memory)),
          w(x + groups),
          y(w + groups),
          leading_x(reinterpret_cast<std::int64_t*>(y + groups)),
          leading_y(leading_x + groups),
          sizes(reinterpret_cast<int*>(leading_y + groups)) {}
};

void fill_grouped_workspace(const GroupedLinear& args, const GroupedWorkspace& workspace,
                            void* stream);

}  // namespace fastllm::cuda::gemm
