#include "fastllm/moe_permute.hpp"

#include "dispatch.hpp"
#include "moe_permute_kernel.hpp"
#include "parallel.hpp"

namespace fastllm::cpu {
namespace {

template <class Kernel, class Args>
void run(const Kernel& kernel, const Args& args) {
    parallel_ranges(args.tokens, rows_per_thread(args.cols * args.choices),
                    [&](std::int64_t begin, std::int64_t end) { kernel(args, begin, end); });
}

}  // namespace

void moe_permute(const MoePermute& args) { run(FASTLLM_KERNELS(moe_permute).permute, args); }
void moe_combine(const MoeCombine& args) {
    const bool stream = should_stream(args.tokens * args.cols *
                                      static_cast<std::int64_t>(size_in_bytes(args.dtype)));
    auto* combine = FASTLLM_KERNELS(moe_permute).combine;
    run([&](const MoeCombine& a, std::int64_t begin,
            std::int64_t end) { combine(a, begin, end, stream); },
        args);
}
void moe_combine_bwd(const MoeCombineBwd& args) {
    run(FASTLLM_KERNELS(moe_permute).combine_bwd, args);
}

}  // namespace fastllm::cpu
