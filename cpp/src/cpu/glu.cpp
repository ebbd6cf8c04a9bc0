#include "fastllm/glu.hpp"

#include <algorithm>

#include "dispatch.hpp"
#include "glu_kernel.hpp"
#include "parallel.hpp"

namespace fastllm::cpu {
namespace {

// Threads begin at multiples of this many elements: whole cache lines, whole vectors.
constexpr std::int64_t kBlock = 64;

template <class Args, class Kernel>
void run(const Args& args, const Kernel& kernel) {
    const bool stream =
        should_stream(args.count * static_cast<std::int64_t>(size_in_bytes(args.dtype)));
    parallel_ranges((args.count + kBlock - 1) / kBlock, kElementsPerThread / kBlock,
                    [&](std::int64_t begin, std::int64_t end) {
                        kernel(args, begin * kBlock, std::min(end * kBlock, args.count), stream);
                    });
}

}  // namespace

void glu_fwd(const GluFwd& args) { run(args, FASTLLM_KERNELS(glu).fwd); }

void glu_bwd(const GluBwd& args) { run(args, FASTLLM_KERNELS(glu).bwd); }

}  // namespace fastllm::cpu
