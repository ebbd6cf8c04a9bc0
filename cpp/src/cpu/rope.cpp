#include "fastllm/rope.hpp"

#include "dispatch.hpp"
#include "parallel.hpp"
#include "rope_kernel.hpp"
#include "row_parts.hpp"

namespace fastllm::cpu {

void rope(const Rope& args) {
    if (args.heads == 0) return;
    const RopeKernels& kernels = FASTLLM_KERNELS(rope);
    const std::int64_t tokens = args.batch * args.tokens;
    const std::int64_t per_token = args.heads * args.head_dim;
    // In place the lines are in the cache anyway.
    const bool stream = args.x != args.y && stream_rows(args.dtype, tokens, per_token);
    parallel_ranges(tokens, rows_per_thread(per_token), [&](std::int64_t begin, std::int64_t end) {
        kernels.run(args, begin, end, stream);
    });
}

}  // namespace fastllm::cpu
