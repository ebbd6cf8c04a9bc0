#include <algorithm>
#include <limits>
#include <stdexcept>

#include "launch.hpp"
#include "rope.cuh"

namespace fastllm::cuda {
namespace {

template <class T, int kWidth, bool kInterleaved>
void launch(const Rope& r, void* stream) {
    const RopeArguments<T> arguments{static_cast<int>(r.tokens),
                                     static_cast<int>(r.heads),
                                     static_cast<int>(r.head_dim),
                                     static_cast<int>(r.rotary_dim),
                                     r.inverse ? -1.0f : 1.0f,
                                     static_cast<const T*>(r.x),
                                     r.x_strides,
                                     r.cos,
                                     r.sin,
                                     r.table_rows,
                                     r.positions,
                                     static_cast<T*>(r.y),
                                     r.y_strides};
    const std::int64_t accesses = r.rotary_dim / (kInterleaved ? kWidth : 2 * kWidth);
    const int along = static_cast<int>(std::clamp<std::int64_t>(accesses, 1, 32));
    const int across = static_cast<int>(std::clamp<std::int64_t>(kRopeThreads / along, 1, r.heads));
    const auto rope = &rope_kernel<T, kWidth, kInterleaved>;
    FASTLLM_LAUNCH(rope, dim3(blocks_of(r.batch * r.tokens, 1)), dim3(along, across), stream,
                   arguments);
    check(cudaGetLastError(), "rope");
}

bool wide(const Rope& r, std::int64_t width) {
    const RopeStrides& a = r.x_strides;
    const RopeStrides& b = r.y_strides;
    const std::int64_t group = r.interleaved ? r.rotary_dim : r.rotary_dim / 2;
    // The tables' rows are read 16 bytes at a time too, 4 floats.
    return aligned16({r.x, r.y, r.cos, r.sin}) && (r.rotary_dim / 2) % 4 == 0 &&
           (group | a.batch | a.token | a.head | b.batch | b.token | b.head) % width == 0;
}

template <class T>
void run(const Rope& r, void* stream) {
    const bool use_wide = wide(r, kPackWidth<T>);
    if (r.interleaved) {
        if (use_wide) return launch<T, kPackWidth<T>, true>(r, stream);
        return launch<T, 2, true>(r, stream);
    }
    if (use_wide) return launch<T, kPackWidth<T>, false>(r, stream);
    launch<T, 1, false>(r, stream);
}

}  // namespace

void rope(const Rope& args, void* stream) {
    if (args.batch * args.tokens * args.heads == 0) return;
    for (const std::int64_t size : {args.tokens, args.heads, args.head_dim}) {
        if (size > std::numeric_limits<std::int32_t>::max()) {
            throw std::runtime_error("rope: a dimension is over 2^31 - 1");
        }
    }
    switch (args.dtype) {
        case DType::kFloat32:
            return run<float>(args, stream);
        case DType::kBFloat16:
            return run<__nv_bfloat16>(args, stream);
        case DType::kFloat16:
            return run<__half>(args, stream);
    }
}

}  // namespace fastllm::cuda
