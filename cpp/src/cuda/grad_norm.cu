#include "fastllm/grad_norm.hpp"
#include "grad_norm.cuh"
#include "launch.hpp"

namespace fastllm::cuda {
namespace {

template <class T, int kWidth>
void launch(const SquaredSum& a, void* stream) {
    const auto squared_sum = &squared_sum_kernel<T, kWidth>;
    FASTLLM_LAUNCH(squared_sum, dim3(static_cast<unsigned>(a.parts)), dim3(kGradNormThreads),
                   stream, static_cast<const T*>(a.x), a.partial, a.count);
    check(cudaGetLastError(), "squared_sum");
}

constexpr std::int64_t kPartElements = std::int64_t{kGradNormThreads} * kGradNormPacks;

}  // namespace

std::int64_t squared_sum_parts(std::int64_t count) {
    // As many as narrow accesses need; with wide ones the last blocks have nothing and write 0.
    return blocks_of(count, kPartElements);
}

void squared_sum(const SquaredSum& args, void* stream) {
    if (args.count == 0) return;
    with_element_type(args.dtype, [&](auto zero) {
        using T = decltype(zero);
        if (!aligned16({args.x})) return launch<T, 1>(args, stream);
        launch<T, kPackWidth<T>>(args, stream);
    });
}

}  // namespace fastllm::cuda
