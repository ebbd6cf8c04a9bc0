// Host side of column_sums.cuh.
#pragma once

#include "column_sums.cuh"
#include "launch.hpp"

namespace fastllm::cuda {

// out[cols] from partial[parts, cols], which was written with packs of kWidth.
template <class T, int kWidth>
void launch_column_sums(const float* partial, void* out, std::int64_t parts, std::int64_t cols,
                        void* stream) {
    const auto column_sums = &column_sums_kernel<T, kWidth>;
    const dim3 grid(static_cast<unsigned>((cols + kWarp - 1) / kWarp));
    FASTLLM_LAUNCH(column_sums, grid, dim3(kWarp, kReduceLanes), stream, partial,
                   static_cast<T*>(out), static_cast<int>(parts), static_cast<int>(cols));
    check(cudaGetLastError(), "column_sums");
}

}  // namespace fastllm::cuda
