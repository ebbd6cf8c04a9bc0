#include "fastllm/rmsnorm.hpp"

#include <algorithm>

#include "dispatch.hpp"
#include "parallel.hpp"
#include "rmsnorm_kernel.hpp"

namespace fastllm::cpu {
namespace {

bool streams(DType dtype, std::int64_t rows, std::int64_t cols) {
    return should_stream(rows * cols * static_cast<std::int64_t>(size_in_bytes(dtype)));
}

}  // namespace

void rmsnorm_fwd(const RmsNormFwd& args) {
    const RmsNormKernels& kernels = FASTLLM_KERNELS(rmsnorm);
    const bool stream = streams(args.dtype, args.rows, args.cols);
    parallel_ranges(
        args.rows, rows_per_thread(args.cols),
        [&](std::int64_t begin, std::int64_t end) { kernels.fwd(args, begin, end, stream); });
}

std::int64_t rmsnorm_bwd_parts(std::int64_t rows, std::int64_t cols) {
    // A part costs cols float additions once more, so it gets 16 rows or more; 64 parts keep that
    // many threads busy. Nothing here depends on the number of threads, so neither does the result.
    (void)cols;
    return std::clamp<std::int64_t>(rows / 16, 1, 64);
}

void rmsnorm_bwd(const RmsNormBwd& args) {
    const RmsNormKernels& kernels = FASTLLM_KERNELS(rmsnorm);
    const bool stream = streams(args.dtype, args.rows, args.cols);
    const std::int64_t rows_per_part = (args.rows + args.parts - 1) / args.parts;
    const std::int64_t grain = std::max<std::int64_t>(
        1, rows_per_thread(args.cols) / std::max<std::int64_t>(1, rows_per_part));
    parallel_ranges(args.parts, grain, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t part = begin; part < end; ++part) kernels.bwd_part(args, part, stream);
    });
    // Whole cache lines of dweight per thread.
    const std::int64_t blocks = (args.cols + 63) / 64;
    parallel_ranges(blocks, std::max<std::int64_t>(1, kElementsPerThread / (64 * args.parts)),
                    [&](std::int64_t begin, std::int64_t end) {
                        kernels.bwd_reduce(args, begin * 64, std::min(end * 64, args.cols));
                    });
}

}  // namespace fastllm::cpu
