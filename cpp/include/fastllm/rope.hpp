// Rotary position embedding (Su et al., "RoFormer", arXiv:2104.09864) with given angles.
//
// The first rotary_dim channels of every head are pairs (a, b) that turn by the angle of the token:
//
//   a' = round(a cos - b sin)        pair i is channels (i, i + rotary_dim / 2)   half-split
//   b' = round(b cos + a sin)        or channels (2i, 2i + 1)                     interleaved
//
// in float32. The other channels are copied. `inverse` turns by the negative angle, which is the
// gradient.
//
// Token s of batch b takes row positions[b * tokens + s] of the tables, or row s without positions;
// so offsets and packed sequences are a matter of positions, and frequency scaling one of the
// tables. A row outside of the tables makes the token's rotated channels NaN.
//
// x and y are [batch, tokens, heads, head_dim] with any strides but 1 between channels. y may be x
// with the same strides; otherwise they must not overlap.
#pragma once

#include <cstdint>

#include "fastllm/dtype.hpp"

namespace fastllm {

struct RopeStrides {  // in elements
    std::int64_t batch;
    std::int64_t token;
    std::int64_t head;
};

struct Rope {
    DType dtype;  // of x and y
    std::int64_t batch;
    std::int64_t tokens;
    std::int64_t heads;
    std::int64_t head_dim;
    std::int64_t rotary_dim;  // even, at most head_dim
    bool interleaved;
    bool inverse;
    const void* x;
    RopeStrides x_strides;
    const float* cos;               // [table_rows, rotary_dim / 2]
    const float* sin;               // [table_rows, rotary_dim / 2]
    std::int64_t table_rows;        // at least `tokens` without positions
    const std::int64_t* positions;  // [batch, tokens], or null
    void* y;
    RopeStrides y_strides;
};

namespace cpu {

// Runs on OpenMP threads and returns when done.
void rope(const Rope& args);

}  // namespace cpu

namespace cuda {

// Enqueues on `stream` (a cudaStream_t) of the current device; throws std::runtime_error when
// refused.
void rope(const Rope& args, void* stream);

}  // namespace cuda

}  // namespace fastllm
