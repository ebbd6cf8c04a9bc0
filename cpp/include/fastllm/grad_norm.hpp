// Sum of the squares of a tensor's elements, for the norm of a gradient.
//
//   partial[p] = sum of x_i^2 over part p
//
// in float32, over `parts` disjoint parts in a fixed order; the caller adds the parts of all
// tensors, in its own fixed order. The same inputs with the same `parts` give the same bits. NaN
// and infinity propagate. count may be 0.
#pragma once

#include <cstdint>

#include "fastllm/dtype.hpp"

namespace fastllm {

struct SquaredSum {
    DType dtype;
    std::int64_t count;
    const void* x;
    float* partial;      // [parts]
    std::int64_t parts;  // what squared_sum_parts(count) of the same namespace returns
};

namespace cpu {

// Runs on OpenMP threads and returns when done. Results do not depend on the number of threads.
void squared_sum(const SquaredSum& args);
std::int64_t squared_sum_parts(std::int64_t count);

}  // namespace cpu

namespace cuda {

// Enqueue on `stream` (a cudaStream_t) of the current device; throw std::runtime_error when
// refused.
void squared_sum(const SquaredSum& args, void* stream);
std::int64_t squared_sum_parts(std::int64_t count);

}  // namespace cuda

}  // namespace fastllm
