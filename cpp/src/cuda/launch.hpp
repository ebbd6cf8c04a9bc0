// Host-side pieces that every launcher uses.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>

#include "fastllm/dtype.hpp"

namespace fastllm::cuda {

// Throws std::runtime_error naming `what` unless `status` is cudaSuccess.
void check(cudaError_t status, const char* what);

// Streaming multiprocessors of the current device.
int multiprocessors();

// Whether 16-byte accesses at multiples of 16 bytes are aligned in all of `pointers` (null ones
// excepted).
bool aligned16(std::initializer_list<const void*> pointers);

// Rows of `cols` elements over threads: either one warp per row and several rows per block, or one
// block per row.
struct RowLayout {
    int width;            // elements per access: 1 or 16 bytes' worth
    int threads_per_row;  // a multiple of 32
    int rows_per_block;   // 1 unless threads_per_row is 32
};

// `packs_per_thread` is how many accesses of a row one thread can keep in registers. Throws
// std::runtime_error when cols is over 2^31 - 1, since kernels index the elements of a row with 32
// bits.
RowLayout row_layout(DType dtype, std::int64_t cols, bool aligned, int packs_per_thread,
                     int max_threads);

// Blocks of `per_block` items for `count` items; throws std::runtime_error beyond what a grid can
// have.
unsigned blocks_of(std::int64_t count, std::int64_t per_block);

// Blocks for `rows`; throws std::runtime_error beyond what a grid can have.
unsigned blocks_for(std::int64_t rows, const RowLayout& layout);

}  // namespace fastllm::cuda
