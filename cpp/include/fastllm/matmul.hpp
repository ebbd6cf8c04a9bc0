// Products of float32 matrices on a CPU: c = a b, or c += a b.
//
// Of a and b, rows or columns are adjacent in memory; of c, rows. Sums are taken over stretches of
// kDepth terms, each with fused multiply-add in order, and added in order: a result is the same
// bits for any number of threads. c overlaps neither a nor b.
#pragma once

#include <cstdint>

namespace fastllm {

struct Matmul {
    std::int64_t m, n, k;  // a is (m, k), b is (k, n)
    const float* a;
    std::int64_t a_row, a_col;  // strides in elements, one of which is 1
    const float* b;
    std::int64_t b_row, b_col;
    float* c;
    std::int64_t c_row;  // its columns are adjacent
    bool accumulate;
};

namespace cpu {

// Runs on OpenMP threads and returns when done.
void matmul(const Matmul& args);

// Whether that is expected to outdo the BLAS that torch is built with: Intel's, which on the
// processors of others takes its code for AVX2 where they have AVX-512.
bool matmul_pays();

}  // namespace cpu

}  // namespace fastllm
