// A tile of a matrix product, in registers: kRows rows of kVectors vectors.
#pragma once

#include <type_traits>

#include "simd.hpp"

namespace fastllm::cpu::FASTLLM_ISA {

// Elements of a, at row r and depth d of the tile.
//
// Rows adjacent, depths kStride apart: what pack_panel() makes.
template <int kStride>
struct ColumnMajor {
    const float* at;
    FASTLLM_INLINE float operator()(int r, std::int64_t d) const { return at[d * kStride + r]; }
};
// Rows `stride` apart, depths adjacent.
struct RowMajor {
    const float* at;
    std::int64_t stride;
    FASTLLM_INLINE float operator()(int r, std::int64_t d) const { return at[r * stride + d]; }
};

struct Nothing {
    FASTLLM_INLINE void operator()() const {}
};

// c (+)= a b over `depth`, of which the first `rows` rows are stored. `b` has kVectors vectors at
// each depth, `b_stride` elements apart. Rows of `a` that are not stored are read. `beside` is
// called once every four depths.
template <int kRows, int kVectors, bool kAccumulate, class A, class Beside = Nothing>
FASTLLM_INLINE void multiply_tile(const A& a, const float* b, std::int64_t b_stride,
                                  std::int64_t depth, float* c, std::int64_t c_stride, int rows,
                                  const Beside& beside = {}) {
    constexpr std::int64_t kBeside = 4;
    Vec sum[kRows][kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[r][v] = broadcast(0.0f);
    }
    const auto add = [&](std::int64_t begin, std::int64_t end) __attribute__((always_inline)) {
        for (std::int64_t d = begin; d < end; ++d) {
            Vec right[kVectors];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                right[v] = load(b + d * b_stride + v * kWidth, AllLanes{});
            }
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
                const Vec left = broadcast(a(r, d));
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) {
                    sum[r][v] = multiply_add(left, right[v], sum[r][v]);
                }
            }
        }
    };
    if constexpr (std::is_same_v<Beside, Nothing>) {
        add(0, depth);
    } else {
        for (std::int64_t d = 0; d < depth; d += kBeside) {
            beside();
            add(d, d + kBeside < depth ? d + kBeside : depth);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
        if (r >= rows) break;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            float* out = c + r * c_stride + v * kWidth;
            store(out, kAccumulate ? load(out, AllLanes{}) + sum[r][v] : sum[r][v], AllLanes{});
        }
    }
}

using Four = float __attribute__((vector_size(16)));

FASTLLM_INLINE Four load_four(const float* p) {
    Four v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

// to[d * stride + r] = from[r * row + d] for 4 rows and `depth` depths.
FASTLLM_INLINE void transpose_four(const float* from, std::int64_t row, std::int64_t depth,
                                   float* to, std::int64_t stride) {
    std::int64_t d = 0;
    for (; d + 4 <= depth; d += 4) {
        const Four a = load_four(from + d), b = load_four(from + row + d);
        const Four e = load_four(from + 2 * row + d), f = load_four(from + 3 * row + d);
        const Four ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
        const Four ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
        const Four ef_low = __builtin_shufflevector(e, f, 0, 4, 1, 5);
        const Four ef_high = __builtin_shufflevector(e, f, 2, 6, 3, 7);
        const Four columns[4] = {__builtin_shufflevector(ab_low, ef_low, 0, 1, 4, 5),
                                 __builtin_shufflevector(ab_low, ef_low, 2, 3, 6, 7),
                                 __builtin_shufflevector(ab_high, ef_high, 0, 1, 4, 5),
                                 __builtin_shufflevector(ab_high, ef_high, 2, 3, 6, 7)};
        for (int i = 0; i < 4; ++i) {
            __builtin_memcpy(to + (d + i) * stride, &columns[i], sizeof columns[i]);
        }
    }
    for (; d < depth; ++d) {
        for (int r = 0; r < 4; ++r) to[d * stride + r] = from[r * row + d];
    }
}

// A panel of kPanel rows (the rest 0 where there are only `rows`): to[d * kPanel + r] is the
// element at row r and depth d of `from`. Either stride is 1.
template <int kPanel>
FASTLLM_INLINE void pack_panel(const float* from, std::int64_t row, std::int64_t column, int rows,
                               std::int64_t depth, float* to) {
    if (rows < kPanel) {
        for (std::int64_t d = 0; d < depth; ++d) {
            for (int r = 0; r < kPanel; ++r) {
                to[d * kPanel + r] = r < rows ? from[r * row + d * column] : 0.0f;
            }
        }
    } else if (row == 1) {
        for (std::int64_t d = 0; d < depth; ++d) {
            __builtin_memcpy(to + d * kPanel, from + d * column, kPanel * sizeof(float));
        }
    } else {
        static_assert(kPanel % 4 == 0);
        // A wide panel does not fit into the first-level cache: its lines are filled at once.
        const std::int64_t step = kPanel > 16 ? 16 : depth;
        for (std::int64_t d = 0; d < depth; d += step) {
            const std::int64_t some = depth - d < step ? depth - d : step;
            for (int r = 0; r < kPanel; r += 4) {
                transpose_four(from + r * row + d, row, some, to + d * kPanel + r, kPanel);
            }
        }
    }
}

}  // namespace fastllm::cpu::FASTLLM_ISA
