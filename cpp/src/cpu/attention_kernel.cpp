// Compiled once per vector level; see simd/simd.hpp.
//
// A tile of scores has a row for every key and a column for every query: what softmax does to a
// query, it does to a lane, and a row of the tile is a row of probabilities for the sums over
// queries (dk, dv), a column one for the sums over keys (out, dq).
#include "attention_kernel.hpp"

#include "simd/exp.hpp"
#include "simd/simd.hpp"
#include "simd/tile.hpp"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

constexpr int kBlock = kAttentionBlock;
constexpr int kGroups = kBlock / kWidth;  // vectors of a row of the tile
constexpr int kRows = kWidth == 16 ? 8 : kWidth == 8 ? 4 : 2;
constexpr int kVectors = kWidth == 4 ? 4 : 2;
constexpr float kLn2 = 0.693147181f;

struct alignas(64) Tile {
    float at[kBlock * kBlock];
    FASTLLM_INLINE float* row(std::int64_t r) { return at + r * kBlock; }
};
// The vectors of a block of queries: a row for every channel, a column for every query.
struct alignas(64) Columns {
    float at[kAttentionDim * kBlock];
};
struct alignas(64) PerQuery {
    float at[kBlock];
};

FASTLLM_INLINE int least(std::int64_t x, std::int64_t y) { return static_cast<int>(x < y ? x : y); }

// c (+)= a b for `rows` rows of a, up to kRows, and `cols` columns of b, a multiple of 16.
template <int kMost, bool kAccumulate, class A>
FASTLLM_INLINE void multiply_rows(const A& a, const float* b, std::int64_t b_stride,
                                  std::int64_t depth, float* c, std::int64_t c_stride, int rows,
                                  std::int64_t cols) {
    constexpr std::int64_t kCols = kVectors * kWidth;
    std::int64_t i = 0;
    for (; i + kCols <= cols; i += kCols) {
        multiply_tile<kMost, kVectors, kAccumulate>(a, b + i, b_stride, depth, c + i, c_stride,
                                                    rows);
    }
    if constexpr (kCols > 16) {
        if (i < cols) {
            multiply_tile<kMost, 16 / kWidth, kAccumulate>(a, b + i, b_stride, depth, c + i,
                                                           c_stride, rows);
        }
    }
}

template <class A>
void multiply(const A& a, const float* b, std::int64_t b_stride, std::int64_t depth, float* c,
              std::int64_t c_stride, int rows, std::int64_t cols, bool accumulate) {
    if (accumulate) {
        multiply_rows<kRows, true>(a, b, b_stride, depth, c, c_stride, rows, cols);
    } else {
        multiply_rows<kRows, false>(a, b, b_stride, depth, c, c_stride, rows, cols);
    }
}

// `rows` rows of `from`, turned; columns without a row are 0.
void turn(const float* from, std::int64_t token, int rows, std::int64_t dim, float scale,
          Columns& to) {
    int r = 0;
    for (; r + 4 <= rows; r += 4) transpose_four(from + r * token, token, dim, to.at + r, kBlock);
    for (; r < kBlock; ++r) {
        for (std::int64_t d = 0; d < dim; ++d) {
            to.at[d * kBlock + r] = r < rows ? from[r * token + d] : 0.0f;
        }
    }
    if (scale == 1.0f) return;
    const Vec by = broadcast(scale);
    for (std::int64_t i = 0; i < dim * kBlock; i += kWidth) {
        store(to.at + i, load(to.at + i, AllLanes{}) * by, AllLanes{});
    }
}

// Rows of keys times the turned queries. On the diagonal, what no key of a row of vectors may see
// is left out: columns before `first` of a row are not written.
void scores(const float* keys, std::int64_t token, int count, std::int64_t dim,
            const Columns& queries, bool diagonal, Tile& to) {
    constexpr int kCols = kVectors * kWidth;
    for (int r = 0; r < count; r += kRows) {
        const int first = diagonal ? r / kCols * kCols : 0;
        const float* const b = queries.at + first;
        if (r + kRows <= count) {
            const RowMajor a{keys + r * token, token};
            multiply_rows<kRows, false>(a, b, kBlock, dim, to.row(r) + first, kBlock, kRows,
                                        kBlock - first);
            continue;
        }
        for (int one = r; one < count; ++one) {  // no row behind the last may be read
            const RowMajor a{keys + one * token, token};
            multiply_rows<1, false>(a, b, kBlock, dim, to.row(one) + first, kBlock, 1,
                                    kBlock - first);
        }
    }
}

// On the diagonal, what queries before key r have of it.
FASTLLM_INLINE void hide_later_keys(Tile& tile, int count, float value) {
    for (int r = 0; r < count; ++r) {
        for (int c = 0; c < r; ++c) tile.at[r * kBlock + c] = value;
    }
}

FASTLLM_INLINE const float* place(const Heads& x, std::int64_t batch, std::int64_t token,
                                  std::int64_t head) {
    return x.at + batch * x.batch + token * x.token + head * x.head;
}

// Scores (base 2) become exp(score - largest so far). Returns whether a largest one grew; `shrink`
// is what sums made before are to be multiplied with.
FASTLLM_INLINE bool exponentials(Tile& tile, int count, PerQuery& largest, PerQuery& total,
                                 PerQuery& shrink) {
    bool grew = false;
    for (int g = 0; g < kGroups; ++g) {
        float* const column = tile.at + g * kWidth;
        const Vec before = load(largest.at + g * kWidth, AllLanes{});
        Vec most = before;
        for (int r = 0; r < count; ++r) most = maximum(load(column + r * kBlock, AllLanes{}), most);
        grew = grew || any_above(most, before);
        const Vec less = power_of_two(before - most);
        Vec sum = load(total.at + g * kWidth, AllLanes{}) * less;
        for (int r = 0; r < count; ++r) {
            const Vec e = power_of_two(load(column + r * kBlock, AllLanes{}) - most);
            store(column + r * kBlock, e, AllLanes{});
            sum = sum + e;
        }
        store(largest.at + g * kWidth, most, AllLanes{});
        store(total.at + g * kWidth, sum, AllLanes{});
        store(shrink.at + g * kWidth, less, AllLanes{});
    }
    return grew;
}

FASTLLM_INLINE void scale_row(float* row, std::int64_t dim, float by) {
    for (std::int64_t d = 0; d < dim; d += kWidth) {
        store(row + d, load(row + d, AllLanes{}) * broadcast(by), AllLanes{});
    }
}

void fwd(const AttentionFwd& args, std::int64_t batch, std::int64_t head, std::int64_t block) {
    const std::int64_t dim = args.dim, begin = block * kBlock;
    const std::int64_t kv_head = head / (args.heads / args.kv_heads);
    const int rows = least(kBlock, args.length - begin);
    const std::int64_t token = args.heads * dim;
    float* const out = args.out + (batch * args.length + begin) * token + head * dim;
    Columns queries;
    Tile tile;
    PerQuery largest, total, shrink;
    for (int i = 0; i < kBlock; ++i) {
        largest.at[i] = detail::float_of(0xff800000u);
        total.at[i] = 0.0f;
    }
    turn(place(args.q, batch, begin, head), args.q.token, rows, dim, args.scale * kLog2OfE,
         queries);
    for (std::int64_t key = 0; key <= begin; key += kBlock) {
        const bool diagonal = key == begin;
        const int count = diagonal ? rows : kBlock;
        scores(place(args.k, batch, key, kv_head), args.k.token, count, dim, queries, diagonal,
               tile);
        if (diagonal) hide_later_keys(tile, count, detail::float_of(0xff800000u));
        const bool grew = exponentials(tile, count, largest, total, shrink);
        if (grew && key > 0) {
            for (int r = 0; r < rows; ++r) scale_row(out + r * token, dim, shrink.at[r]);
        }
        const float* const values = place(args.v, batch, key, kv_head);
        for (int r = 0; r < rows; r += kRows) {
            const int seen = diagonal ? least(count, r + kRows) : count;
            multiply(ColumnMajor<kBlock>{tile.at + r}, values, args.v.token, seen, out + r * token,
                     token, least(kRows, rows - r), dim, key > 0);
        }
    }
    float* const lse = args.lse + (batch * args.heads + head) * args.length + begin;
    for (int r = 0; r < rows; ++r) {
        scale_row(out + r * token, dim, 1.0f / total.at[r]);
        lse[r] = largest.at[r] * kLn2 + __builtin_logf(total.at[r]);
    }
}

// What a block of queries has of every tile.
struct Queries {
    Columns q, dout;
    PerQuery lse, delta;  // base 2; dout . out
};

void prepare(const AttentionBwd& args, std::int64_t batch, std::int64_t head, std::int64_t begin,
             int rows, Queries& to) {
    const float* const dout = place(args.dout, batch, begin, head);
    const float* const out = place(args.out, batch, begin, head);
    turn(place(args.q, batch, begin, head), args.q.token, rows, args.dim, args.scale * kLog2OfE,
         to.q);
    turn(dout, args.dout.token, rows, args.dim, 1.0f, to.dout);
    const float* const lse = args.lse + (batch * args.heads + head) * args.length + begin;
    for (int r = 0; r < kBlock; ++r) {
        to.lse.at[r] = to.delta.at[r] = 0.0f;
        if (r >= rows) continue;
        to.lse.at[r] = lse[r] * kLog2OfE;
        Vec sum = broadcast(0.0f);
        for (std::int64_t d = 0; d < args.dim; d += kWidth) {
            sum = multiply_add(load(dout + r * args.dout.token + d, AllLanes{}),
                               load(out + r * args.out.token + d, AllLanes{}), sum);
        }
        to.delta.at[r] = FASTLLM_ISA::sum(sum);
    }
}

// From scores (base 2) and dout . v: probabilities, and the gradients of the scores.
FASTLLM_INLINE void score_gradients(Tile& p, Tile& ds, int count, const Queries& queries,
                                    float scale) {
    const Vec by = broadcast(scale);
    for (int g = 0; g < kGroups; ++g) {
        const Vec lse = load(queries.lse.at + g * kWidth, AllLanes{});
        const Vec delta = load(queries.delta.at + g * kWidth, AllLanes{});
        for (int r = 0; r < count; ++r) {
            float* const probability = p.row(r) + g * kWidth;
            float* const gradient = ds.row(r) + g * kWidth;
            const Vec e = power_of_two(load(probability, AllLanes{}) - lse);
            store(probability, e, AllLanes{});
            store(gradient, (load(gradient, AllLanes{}) - delta) * (e * by), AllLanes{});
        }
    }
}

void bwd(const AttentionBwd& args, std::int64_t batch, std::int64_t kv_head) {
    const std::int64_t dim = args.dim, group = args.heads / args.kv_heads;
    const std::int64_t token = args.heads * dim, kv_token = args.kv_heads * dim;
    Queries queries;
    Tile p, ds;
    for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        for (std::int64_t begin = 0; begin < args.length; begin += kBlock) {
            const int rows = least(kBlock, args.length - begin);
            prepare(args, batch, head, begin, rows, queries);
            const float* const q = place(args.q, batch, begin, head);
            const float* const dout = place(args.dout, batch, begin, head);
            float* const dq = args.dq + (batch * args.length + begin) * token + head * dim;
            for (std::int64_t key = 0; key <= begin; key += kBlock) {
                const bool diagonal = key == begin;
                const int count = diagonal ? rows : kBlock;
                const float* const k = place(args.k, batch, key, kv_head);
                scores(k, args.k.token, count, dim, queries.q, diagonal, p);
                scores(place(args.v, batch, key, kv_head), args.v.token, count, dim, queries.dout,
                       diagonal, ds);
                if (diagonal) {
                    hide_later_keys(p, count, detail::float_of(0xff800000u));
                    hide_later_keys(ds, count, 0.0f);
                }
                score_gradients(p, ds, count, queries, args.scale);
                const bool added = !diagonal || head > kv_head * group;
                const std::int64_t at = (batch * args.length + key) * kv_token + kv_head * dim;
                for (int r = 0; r < count; r += kRows) {
                    const int from = diagonal ? r : 0;  // the first query that sees one of them
                    const int least_rows = least(kRows, count - r);
                    multiply(RowMajor{p.row(r) + from, kBlock}, dout + from * args.dout.token,
                             args.dout.token, rows - from, args.dv + at + r * kv_token, kv_token,
                             least_rows, dim, added);
                    multiply(RowMajor{ds.row(r) + from, kBlock}, q + from * args.q.token,
                             args.q.token, rows - from, args.dk + at + r * kv_token, kv_token,
                             least_rows, dim, added);
                }
                for (int r = 0; r < rows; r += kRows) {
                    const int seen = diagonal ? least(count, r + kRows) : count;
                    multiply(ColumnMajor<kBlock>{ds.at + r}, k, args.k.token, seen, dq + r * token,
                             token, least(kRows, rows - r), dim, key > 0);
                }
            }
        }
    }
}

}  // namespace

const AttentionKernels attention = {fwd, bwd};

}  // namespace fastllm::cpu::FASTLLM_ISA
