// The sums over rows, column by column, of kernels whose work is divided into parts of rows: each
// part adds its rows to a row of `partial`, and the parts are added in their order.
#pragma once

#include "simd.hpp"

namespace fastllm::cpu::FASTLLM_ISA {

struct RowRange {
    std::int64_t begin;
    std::int64_t end;
};

// Args has rows and parts.
template <class Args>
FASTLLM_INLINE RowRange rows_of_part(const Args& a, std::int64_t part) {
    const std::int64_t rows_per_part = (a.rows + a.parts - 1) / a.parts;
    const std::int64_t begin = part * rows_per_part;
    return {begin, begin + rows_per_part < a.rows ? begin + rows_per_part : a.rows};
}

// Adds v to partial[c...], whose order within a pair of vectors is that of the kernel's element
// type.
template <class V, class Lanes>
FASTLLM_INLINE void add_to(float* partial, V v, Lanes lanes) {
    store(partial, load(partial, lanes) + v, lanes);
}

// out[c] for columns [begin, end), from the parts' rows of `cols` columns.
template <class T>
void add_parts(const float* partial, std::int64_t parts, std::int64_t cols, T* out,
               std::int64_t begin, std::int64_t end) {
    for_each_pair(end - begin, [&](std::int64_t c, int, auto lanes) FASTLLM_LAMBDA {
        auto total = load(partial + begin + c, lanes);
        for (std::int64_t part = 1; part < parts; ++part) {
            total = total + load(partial + part * cols + begin + c, lanes);
        }
        store(out + begin + c, total, lanes);
    });
}

}  // namespace fastllm::cpu::FASTLLM_ISA
