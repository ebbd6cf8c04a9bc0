#include "fastllm/grad_norm.hpp"

#include <algorithm>

#include "dispatch.hpp"
#include "grad_norm_kernel.hpp"
#include "parallel.hpp"

namespace fastllm::cpu {
namespace {

// Elements of a part: few enough that float32 loses little in a lane's sum.
constexpr std::int64_t kPart = std::int64_t{1} << 16;

}  // namespace

std::int64_t squared_sum_parts(std::int64_t count) { return (count + kPart - 1) / kPart; }

void squared_sum(const SquaredSum& args) {
    const GradNormKernels& kernels = FASTLLM_KERNELS(grad_norm);
    parallel_ranges(args.parts, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t part = begin; part < end; ++part) {
            args.partial[part] =
                kernels.squared_sum(args, part * kPart, std::min((part + 1) * kPart, args.count));
        }
    });
}

}  // namespace fastllm::cpu
