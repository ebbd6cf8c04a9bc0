// Compiled once per vector level; see simd/simd.hpp.
#include "grad_norm_kernel.hpp"

#include "simd/simd.hpp"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

float squared_sum_any(const SquaredSum& a, std::int64_t begin, std::int64_t end) {
    Sum4 squares;
    with_element_type(a.dtype, [&](auto zero) FASTLLM_LAMBDA {
        const auto* x = static_cast<const decltype(zero)*>(a.x) + begin;
        for_each_pair(end - begin, [&](std::int64_t i, int slot, auto lanes) FASTLLM_LAMBDA {
            prefetch(x + i + kAhead<decltype(zero)>, lanes);
            const auto v = load(x + i, lanes);
            squares.add_product(slot, v, v);
        });
    });
    return squares.total();
}

}  // namespace

const GradNormKernels grad_norm = {squared_sum_any};

}  // namespace fastllm::cpu::FASTLLM_ISA
