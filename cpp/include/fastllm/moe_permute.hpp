// Rows of tokens to places ordered by expert, and back, for a mixture of experts with `choices`
// experts per token (Gale et al., "MegaBlocks", arXiv:2211.15841).
//
// slots[t, k] is the place of token t's k-th copy; negative where it was dropped.
//
//   permute:  y[slots[t, k]] = x[t]
//   combine:  out[t] = round(sum_k(weights[t, k] * y[slots[t, k]]))          weights 1 if null
//   combine's gradients:
//     dy[slots[t, k]] = round(weights[t, k] * dout[t])
//     dweights[t, k]  = sum_c(dout[t, c] * y[slots[t, k], c]); 0 where it was dropped
//
// permute's gradient is combine without weights. Sums are float32, in the order of k. Places that
// no slot names are not written. Slots are below `places`, and no two are the same: the caller sees
// to that (a slot past the end is taken as dropped, a repeated one is a race).
//
// Tensors are dense and row-major; no output may overlap anything.
#pragma once

#include <cstdint>

#include "fastllm/dtype.hpp"

namespace fastllm {

struct MoePermute {
    DType dtype;  // of x and y
    std::int64_t tokens;
    std::int64_t choices;
    std::int64_t places;
    std::int64_t cols;
    const std::int64_t* slots;  // [tokens, choices]
    const void* x;              // [tokens, cols]
    void* y;                    // [places, cols]
};

struct MoeCombine {
    DType dtype;  // of y and out
    std::int64_t tokens;
    std::int64_t choices;
    std::int64_t places;
    std::int64_t cols;
    const std::int64_t* slots;  // [tokens, choices]
    const float* weights;       // [tokens, choices], or null
    const void* y;              // [places, cols]
    void* out;                  // [tokens, cols]
};

struct MoeCombineBwd {
    DType dtype;  // of dout, y and dy
    std::int64_t tokens;
    std::int64_t choices;
    std::int64_t places;
    std::int64_t cols;
    const std::int64_t* slots;  // [tokens, choices]
    const float* weights;       // [tokens, choices]
    const void* dout;           // [tokens, cols]
    const void* y;              // [places, cols]
    void* dy;                   // [places, cols]
    float* dweights;            // [tokens, choices]
};

namespace cpu {

// Runs on OpenMP threads and returns when done. Results do not depend on the number of threads.
void moe_permute(const MoePermute& args);
void moe_combine(const MoeCombine& args);
void moe_combine_bwd(const MoeCombineBwd& args);

}  // namespace cpu

namespace cuda {

// Enqueue on `stream` (a cudaStream_t) of the current device; throw std::runtime_error when
// refused.
void moe_permute(const MoePermute& args, void* stream);
void moe_combine(const MoeCombine& args, void* stream);
void moe_combine_bwd(const MoeCombineBwd& args, void* stream);

}  // namespace cuda

}  // namespace fastllm
