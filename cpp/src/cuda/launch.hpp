// Host-side pieces that every launcher uses.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>

#include "fastllm/dtype.hpp"

namespace fastllm::cuda {

// Throws std::runtime_error naming `what` unless `status` is cudaSuccess.
void check(cudaError_t status, const char* what);

// Calls body(zero) with a value of the device's type for `dtype`.
template <class Body>
void with_element_type(DType dtype, const Body& body) {
    switch (dtype) {
        case DType::kFloat32:
            return body(float{});
        case DType::kBFloat16:
            return body(__nv_bfloat16{});
        case DType::kFloat16:
            return body(__half{});
    }
}

// Streaming multiprocessors of the current device.
int multiprocessors();

// Throws std::runtime_error when cols is over 2^31 - 1, since kernels index the elements of a row
// with 32 bits.
void require_indexable(std::int64_t cols);

// Whether 16-byte accesses at multiples of 16 bytes are aligned in all of `pointers` (null ones
// excepted).
bool aligned16(std::initializer_list<const void*> pointers);

// Whether rows of `cols` elements can be accessed 16 bytes at a time. Throws std::runtime_error
// when cols is over 2^31 - 1.
template <class T>
bool packs_fit(std::int64_t cols, std::initializer_list<const void*> pointers) {
    require_indexable(cols);
    return aligned16(pointers) && cols % static_cast<std::int64_t>(16 / sizeof(T)) == 0;
}

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

// Parts for a two-stage sum over rows: a multiple of 4, since with one warp per row a block holds
// four parts.
std::int64_t parts_of_rows(std::int64_t rows, std::int64_t cols);

// Blocks of `per_block` items for `count` items; throws std::runtime_error beyond what a grid can
// have.
unsigned blocks_of(std::int64_t count, std::int64_t per_block);

// Blocks for `rows`; throws std::runtime_error beyond what a grid can have.
unsigned blocks_for(std::int64_t rows, const RowLayout& layout);

}  // namespace fastllm::cuda
