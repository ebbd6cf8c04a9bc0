#include "fastllm/cross_entropy.hpp"

#include "cross_entropy_kernel.hpp"
#include "dispatch.hpp"
#include "parallel.hpp"

namespace fastllm::cpu {

void cross_entropy_fwd(const CrossEntropyFwd& args) {
    const CrossEntropyKernels& kernels = FASTLLM_KERNELS(cross_entropy);
    parallel_ranges(args.rows, rows_per_thread(args.cols),
                    [&](std::int64_t begin, std::int64_t end) { kernels.fwd(args, begin, end); });
}

void cross_entropy_loss(const CrossEntropyLoss& args) {
    const CrossEntropyKernels& kernels = FASTLLM_KERNELS(cross_entropy);
    parallel_ranges(args.rows, rows_per_thread(args.cols),
                    [&](std::int64_t begin, std::int64_t end) { kernels.loss(args, begin, end); });
}

void cross_entropy_bwd(const CrossEntropyBwd& args) {
    const CrossEntropyKernels& kernels = FASTLLM_KERNELS(cross_entropy);
    const bool stream =
        should_stream(args.rows * args.cols * static_cast<std::int64_t>(size_in_bytes(args.dtype)));
    parallel_ranges(
        args.rows, rows_per_thread(args.cols),
        [&](std::int64_t begin, std::int64_t end) { kernels.bwd(args, begin, end, stream); });
}

}  // namespace fastllm::cpu
