#include "fastllm/adamw.hpp"

#include <algorithm>

#include "adamw_kernel.hpp"
#include "dispatch.hpp"
#include "parallel.hpp"

namespace fastllm::cpu {

void adamw(const AdamW& args) {
    const AdamWKernels& kernels = FASTLLM_KERNELS(adamw);
    // Threads begin at whole cache lines of the narrowest tensor.
    constexpr std::int64_t kBlock = 64;
    parallel_ranges((args.count + kBlock - 1) / kBlock, kElementsPerThread / kBlock,
                    [&](std::int64_t begin, std::int64_t end) {
                        kernels.run(args, begin * kBlock, std::min(end * kBlock, args.count));
                    });
}

}  // namespace fastllm::cpu
