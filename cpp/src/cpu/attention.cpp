#include "fastllm/attention.hpp"

#include "attention_kernel.hpp"
#include "dispatch.hpp"
#include "parallel.hpp"

namespace fastllm::cpu {

void attention_fwd(const AttentionFwd& args) {
    const AttentionKernels& kernels = FASTLLM_KERNELS(attention);
    const std::int64_t blocks = (args.length + kAttentionBlock - 1) / kAttentionBlock;
    // A block's work grows with its place: the first goes together with the last.
    const std::int64_t pairs = (blocks + 1) / 2;
    interleaved(args.batch * args.heads * pairs, [&](std::int64_t i) {
        const std::int64_t head = i / pairs, block = i % pairs, other = blocks - 1 - block;
        kernels.fwd(args, head / args.heads, head % args.heads, block);
        if (other != block) kernels.fwd(args, head / args.heads, head % args.heads, other);
    });
}

void attention_bwd(const AttentionBwd& args) {
    const AttentionKernels& kernels = FASTLLM_KERNELS(attention);
    if (args.length == 0) return;
    interleaved(args.batch * args.kv_heads,
                [&](std::int64_t i) { kernels.bwd(args, i / args.kv_heads, i % args.kv_heads); });
}

}  // namespace fastllm::cpu
