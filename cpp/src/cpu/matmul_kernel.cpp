// Compiled once per vector level; see simd/simd.hpp.
//
// The order of loops is Goto's (Goto and van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication", ACM TOMS 34(3), 2008) with b in the second-level cache: a panel of a stays in
// the first-level cache while those of b pass.
#include "matmul_kernel.hpp"

#include "simd/simd.hpp"
#include "simd/tile.hpp"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

// AVX-512 has 32 registers for the sums, a piece of b and an element of a; the others have 16.
constexpr int kRows = kWidth == 16 ? 12 : 4;
constexpr int kVectors = kWidth == 16 ? 2 : 3;
constexpr int kCols = kVectors * kWidth;

FASTLLM_INLINE std::int64_t least(std::int64_t x, std::int64_t y) { return x < y ? x : y; }

void pack_a(const Matmul& args, std::int64_t m, std::int64_t rows, std::int64_t k,
            std::int64_t depth, float* to) {
    for (std::int64_t r = 0; r < rows; r += kRows) {
        pack_panel<kRows>(args.a + (m + r) * args.a_row + k * args.a_col, args.a_row, args.a_col,
                          static_cast<int>(least(kRows, rows - r)), depth, to + r * depth);
    }
}

void pack_b(const Matmul& args, std::int64_t n, std::int64_t cols, std::int64_t k,
            std::int64_t depth, float* to) {
    for (std::int64_t c = 0; c < cols; c += kCols) {
        pack_panel<kCols>(args.b + k * args.b_row + (n + c) * args.b_col, args.b_col, args.b_row,
                          static_cast<int>(least(kCols, cols - c)), depth, to + c * depth);
    }
}

template <bool kAccumulate>
void tile(const float* a, const float* b, std::int64_t depth, float* c, std::int64_t c_row,
          int rows, int cols) {
    const ColumnMajor<kRows> left{a};
    if (cols == kCols) {
        return multiply_tile<kRows, kVectors, kAccumulate>(left, b, kCols, depth, c, c_row, rows);
    }
    alignas(64) float whole[kRows * kCols];
    multiply_tile<kRows, kVectors, false>(left, b, kCols, depth, whole, kCols, rows);
    for (int r = 0; r < rows; ++r) {
        for (int i = 0; i < cols; ++i) {
            float& out = c[r * c_row + i];
            out = kAccumulate ? out + whole[r * kCols + i] : whole[r * kCols + i];
        }
    }
}

void part(const Matmul& args, float* a, float* b) {
    const std::int64_t stretches = (args.k + kDepth - 1) / kDepth;
    for (std::int64_t m = 0; m < args.m; m += kRowsAtOnce) {
        const std::int64_t rows = least(kRowsAtOnce, args.m - m);
        for (std::int64_t s = 0; s < stretches; ++s) {
            const std::int64_t k = args.k * s / stretches;
            const std::int64_t depth = args.k * (s + 1) / stretches - k;
            auto* const one = args.accumulate || s > 0 ? &tile<true> : &tile<false>;
            pack_a(args, m, rows, k, depth, a);
            for (std::int64_t n = 0; n < args.n; n += kColsAtOnce) {
                const std::int64_t cols = least(kColsAtOnce, args.n - n);
                pack_b(args, n, cols, k, depth, b);
                for (std::int64_t r = 0; r < rows; r += kRows) {
                    for (std::int64_t i = 0; i < cols; i += kCols) {
                        one(a + r * depth, b + i * depth, depth,
                            args.c + (m + r) * args.c_row + n + i, args.c_row,
                            static_cast<int>(least(kRows, rows - r)),
                            static_cast<int>(least(kCols, cols - i)));
                    }
                }
            }
        }
    }
}

}  // namespace

const MatmulKernels matmul = {part, kRows, kCols};

}  // namespace fastllm::cpu::FASTLLM_ISA
