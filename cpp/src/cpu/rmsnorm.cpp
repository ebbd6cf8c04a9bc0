#include "fastllm/rmsnorm.hpp"

#include "dispatch.hpp"
#include "parallel.hpp"
#include "rmsnorm_kernel.hpp"
#include "row_parts.hpp"

namespace fastllm::cpu {

void rmsnorm_fwd(const RmsNormFwd& args) {
    const RmsNormKernels& kernels = FASTLLM_KERNELS(rmsnorm);
    const bool stream = stream_rows(args.dtype, args.rows, args.cols);
    parallel_ranges(
        args.rows, rows_per_thread(args.cols),
        [&](std::int64_t begin, std::int64_t end) { kernels.fwd(args, begin, end, stream); });
}

std::int64_t rmsnorm_bwd_parts(std::int64_t rows, std::int64_t) { return parts_of_rows(rows); }

void rmsnorm_bwd(const RmsNormBwd& args) {
    const RmsNormKernels& kernels = FASTLLM_KERNELS(rmsnorm);
    const bool stream = stream_rows(args.dtype, args.rows, args.cols);
    run_parts(
        args, [&](std::int64_t part) { kernels.bwd_part(args, part, stream); },
        [&](std::int64_t begin, std::int64_t end) { kernels.bwd_reduce(args, begin, end); });
}

}  // namespace fastllm::cpu
