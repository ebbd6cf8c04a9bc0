#include "fastllm/rope.hpp"

#include "dispatch.hpp"
#include "parallel.hpp"
#include "rope_kernel.hpp"

namespace fastllm::cpu {

void rope(const Rope& args) {
    if (args.heads == 0) return;
    const RopeKernels& kernels = FASTLLM_KERNELS(rope);
    parallel_ranges(args.batch * args.tokens, rows_per_thread(args.heads * args.head_dim),
                    [&](std::int64_t begin, std::int64_t end) { kernels.run(args, begin, end); });
}

}  // namespace fastllm::cpu
