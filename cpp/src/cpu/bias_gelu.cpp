#include "fastllm/bias_gelu.hpp"

#include "bias_gelu_kernel.hpp"
#include "dispatch.hpp"
#include "parallel.hpp"
#include "row_parts.hpp"

namespace fastllm::cpu {

void bias_gelu_fwd(const BiasGeluFwd& args) {
    const BiasGeluKernels& kernels = FASTLLM_KERNELS(bias_gelu);
    const bool stream = stream_rows(args.dtype, args.rows, args.cols);
    parallel_ranges(
        args.rows, rows_per_thread(args.cols),
        [&](std::int64_t begin, std::int64_t end) { kernels.fwd(args, begin, end, stream); });
}

std::int64_t bias_gelu_bwd_parts(std::int64_t rows, std::int64_t) { return parts_of_rows(rows); }

void bias_gelu_bwd(const BiasGeluBwd& args) {
    const BiasGeluKernels& kernels = FASTLLM_KERNELS(bias_gelu);
    const bool stream = stream_rows(args.dtype, args.rows, args.cols);
    run_parts(
        args, [&](std::int64_t part) { kernels.bwd_part(args, part, stream); },
        [&](std::int64_t begin, std::int64_t end) { kernels.bwd_reduce(args, begin, end); });
}

}  // namespace fastllm::cpu
