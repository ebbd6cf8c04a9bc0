// The per-level entry points of matmul_kernel.cpp.
#pragma once

#include <cstdint>

#include "fastllm/matmul.hpp"

namespace fastllm::cpu {

// A thread keeps (kRowsAtOnce, kDepth) of a in the last cache and (kDepth, kColsAtOnce) of b in its
// own second-level cache, in the order in which it reads them.
inline constexpr std::int64_t kDepth = 512;
inline constexpr std::int64_t kRowsAtOnce = 2016;
inline constexpr std::int64_t kColsAtOnce = 192;
inline constexpr std::int64_t kTileLimit = 64;  // no tile is larger, in either direction

struct MatmulKernels {
    // One thread's part: rows and columns of c of which `args` is a view. `a` has room for
    // kDepth * (kRowsAtOnce + kTileLimit) elements, `b` for kDepth * (kColsAtOnce + kTileLimit).
    void (*part)(const Matmul& args, float* a, float* b);
    int rows, cols;  // of a tile: parts are best multiples of them
};

namespace portable {
extern const MatmulKernels matmul;
}
namespace avx2 {
extern const MatmulKernels matmul;
}
namespace avx512 {
extern const MatmulKernels matmul;
}

}  // namespace fastllm::cpu
