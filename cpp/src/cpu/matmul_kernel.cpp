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

// Rows of a that are packed at once: where they are adjacent, whole cache lines of them.
constexpr std::int64_t kGroup = 4 * kRows;
// So many rows before the end of a block of b the next one is fetched: neither so early that it is
// gone again, nor so late that it is not there.
constexpr std::int64_t kRowsBefore = 20 * kRows;

// Memory that is needed soon, fetched a line at a time beside the products before: what comes from
// the last cache or from memory is then there in time.
class Ahead {
  public:
    void forget() { first_ = last_ = 0; }

    // `runs` of `count` adjacent elements, `stride` apart, to be read or written. What is more than
    // kMost of them is left out.
    FASTLLM_INLINE void expect(const float* from, std::int64_t runs, std::int64_t stride,
                               std::int64_t count, bool write = false) {
        if (last_ - first_ == kMost || runs <= 0 || count <= 0) return;
        Region& region = regions_[last_++ % kMost];
        region.lines = (count + kLine - 1) / kLine;
        region.left = region.lines;
        region.runs = runs;
        region.at = from;
        region.step = stride - region.lines * kLine;
        region.write = write;
    }

    // One line.
    FASTLLM_INLINE void operator()() {
        if (first_ == last_) return;
        Region& region = regions_[first_ % kMost];
        if (region.write) {
            __builtin_prefetch(region.at, 1, 2);
        } else {
            __builtin_prefetch(region.at, 0, 2);
        }
        region.at += kLine;
        if (--region.left > 0) return;
        region.left = region.lines;
        region.at += region.step;
        if (--region.runs == 0) ++first_;
    }

  private:
    static constexpr std::int64_t kLine = 16;  // floats
    static constexpr unsigned kMost = 8;
    struct Region {
        const float* at;
        std::int64_t step, lines, left, runs;
        bool write;
    };
    Region regions_[kMost];
    unsigned first_ = 0, last_ = 0;
};

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

void expect_a(const Matmul& args, std::int64_t m, std::int64_t rows, std::int64_t k,
              std::int64_t depth, Ahead& ahead) {
    const float* const from = args.a + m * args.a_row + k * args.a_col;
    if (args.a_col == 1) {
        ahead.expect(from, rows, args.a_row, depth);
    } else {
        ahead.expect(from, depth, args.a_col, rows);
    }
}

void expect_b(const Matmul& args, std::int64_t n, std::int64_t cols, std::int64_t k,
              std::int64_t depth, Ahead& ahead) {
    const float* const from = args.b + k * args.b_row + n * args.b_col;
    if (args.b_col == 1) {
        ahead.expect(from, depth, args.b_row, cols);
    } else {
        ahead.expect(from, cols, args.b_col, depth);
    }
}

template <bool kAccumulate>
void tile(const float* a, const float* b, std::int64_t depth, float* c, std::int64_t c_row,
          int rows, int cols, Ahead& ahead) {
    for (int r = 0; r < rows; ++r) {
        for (int i = 0; i < cols; i += 16) __builtin_prefetch(c + r * c_row + i, 1, 3);
    }
    const auto beside = [&] { ahead(); };
    const ColumnMajor<kRows> left{a};
    if (cols == kCols) {
        return multiply_tile<kRows, kVectors, kAccumulate>(left, b, kCols, depth, c, c_row, rows,
                                                           beside);
    }
    alignas(64) float whole[kRows * kCols];
    multiply_tile<kRows, kVectors, false>(left, b, kCols, depth, whole, kCols, rows, beside);
    for (int r = 0; r < rows; ++r) {
        for (int i = 0; i < cols; ++i) {
            float& out = c[r * c_row + i];
            out = kAccumulate ? out + whole[r * kCols + i] : whole[r * kCols + i];
        }
    }
}

// Stretch `s` of `stretches` over the depth of the product.
struct Stretch {
    std::int64_t begin, depth;
    Stretch(const Matmul& args, std::int64_t s, std::int64_t stretches)
        : begin(args.k * s / stretches), depth(args.k * (s + 1) / stretches - begin) {}
};

void part(const Matmul& args, float* a, float* b) {
    const std::int64_t stretches = (args.k + kDepth - 1) / kDepth;
    Ahead ahead;
    for (std::int64_t m = 0; m < args.m; m += kRowsAtOnce) {
        const std::int64_t rows = least(kRowsAtOnce, args.m - m);
        for (std::int64_t s = 0; s < stretches; ++s) {
            const auto [k, depth] = Stretch(args, s, stretches);
            auto* const one = args.accumulate || s > 0 ? &tile<true> : &tile<false>;
            for (std::int64_t n = 0; n < args.n; n += kColsAtOnce) {
                const std::int64_t cols = least(kColsAtOnce, args.n - n);
                const std::int64_t then = n + kColsAtOnce;
                pack_b(args, n, cols, k, depth, b);
                ahead.forget();
                for (std::int64_t r = 0; r < rows; r += kRows) {
                    if (n > 0) {
                        ahead.expect(a + (r + kRows) * depth, r + kRows < rows, 0, kRows * depth);
                    } else if (r % kGroup == 0) {
                        pack_a(args, m + r, least(kGroup, rows - r), k, depth, a + r * depth);
                        const std::int64_t next = r + kGroup, left = least(kGroup, rows - next);
                        expect_a(args, m + next, left, k, depth, ahead);
                        ahead.expect(a + next * depth, 1, 0, left * depth, true);
                    }
                    if (rows - r <= kRowsBefore && rows - r > kRowsBefore - kRows) {
                        if (then < args.n) {
                            expect_b(args, then, least(kColsAtOnce, args.n - then), k, depth,
                                     ahead);
                        } else if (s + 1 < stretches) {
                            const auto [next, length] = Stretch(args, s + 1, stretches);
                            expect_b(args, 0, least(kColsAtOnce, args.n), next, length, ahead);
                        }
                    }
                    for (std::int64_t i = 0; i < cols; i += kCols) {
                        one(a + r * depth, b + i * depth, depth,
                            args.c + (m + r) * args.c_row + n + i, args.c_row,
                            static_cast<int>(least(kRows, rows - r)),
                            static_cast<int>(least(kCols, cols - i)), ahead);
                    }
                }
            }
        }
    }
}

}  // namespace

const MatmulKernels matmul = {part, kRows, kCols};

}  // namespace fastllm::cpu::FASTLLM_ISA
