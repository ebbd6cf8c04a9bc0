// Compiled once per vector level; see simd/simd.hpp.
#include "softmax_kernel.hpp"

#include "simd/exp.hpp"
#include "simd/simd.hpp"

namespace fastllm::cpu::FASTLLM_ISA {
namespace {

// So many places are taken at a time, in a buffer that stays in the first-level cache. A row that
// has more takes two passes.
constexpr std::int64_t kStretch = 8192;

FASTLLM_INLINE float no_score() { return detail::float_of(0xff800000u); }
FASTLLM_INLINE float scalar_exp(float x) { return first_lane(exponential(broadcast(x))); }

// Places that query i of a causal row has.
FASTLLM_INLINE std::int64_t causal_places(std::int64_t query, std::int64_t queries,
                                          std::int64_t cols) {
    const std::int64_t places = query + (cols - queries) + 1;
    return places < 0 ? 0 : places > cols ? cols : places;
}

// What the scores of a row are made of.
template <class T>
struct Scores {
    const T* x;
    const T* next;  // row
    float scale;
    const std::uint8_t* mask;  // or null
    float slope;               // of ALiBi, or 0
    float at_first;            // what ALiBi adds at column 0
};

// Scores that are the elements, scaled. A pair of vectors has the order of T.
template <class T>
struct Scaled {
    const T* x;
    float by;
    template <class Lanes>
    FASTLLM_INLINE auto operator()(std::int64_t c, Lanes lanes) const {
        return load(x + c, lanes) * broadcast(by);
    }
    FASTLLM_INLINE float at(std::int64_t c) const { return to_float(x[c]) * by; }
};

// Scores that were made before.
struct Made {
    const float* v;
    template <class Lanes>
    FASTLLM_INLINE auto operator()(std::int64_t c, Lanes lanes) const {
        return load(v + c, lanes);
    }
    FASTLLM_INLINE float at(std::int64_t c) const { return v[c]; }
};

// Scores of places [begin, begin + count), of which those that depend on the place are made in
// `out`: plain loops, of which the compiler makes vectors.
template <bool kPlaces, class T>
FASTLLM_INLINE auto scores_of(const Scores<T>& s, float* out, std::int64_t begin,
                              std::int64_t count) {
    const T* x = s.x + begin;
    if constexpr (!kPlaces) {
        return Scaled<T>{x, s.scale};
    } else {
        const float at_begin = s.at_first + s.slope * static_cast<float>(begin);
        for (std::int64_t c = 0; c < count; ++c) {
            out[c] = to_float(x[c]) * s.scale + (at_begin + s.slope * static_cast<float>(c));
        }
        if (s.mask != nullptr) {
            const std::uint8_t* mask = s.mask + begin;
            const float none = no_score();
            for (std::int64_t c = 0; c < count; ++c) out[c] = mask[c] != 0 ? out[c] : none;
        }
        return Made{out};
    }
}

template <class Score>
float largest_of(const Score& score, std::int64_t count) {
    Max4 top(no_score());
    const std::int64_t whole = count / kWidth * kWidth;
    for_each_pair(whole, [&](std::int64_t c, int slot, auto lanes)
                             FASTLLM_LAMBDA { top.add(slot, score(c, lanes)); });
    float m = top.total();
    for (std::int64_t c = whole; c < count; ++c) m = score.at(c) > m ? score.at(c) : m;
    return m;
}

// Zeros behind the places of a causal row, written around the cache a few at a time beside
// arithmetic: in a row, such stores wait for memory.
template <class T>
struct Zeros {
    T* at;
    T* end;
    int pairs;  // at a time

    // Of [begin, end) what is aligned, to be written in `times` portions as far as these are short.
    // The elements in front are written at once.
    Zeros(T* begin, T* to, std::int64_t times) : at(begin), end(to), pairs(0) {
        while (at < end && !can_stream(at)) *at++ = T{};
        const std::int64_t all = (end - at) / (2 * kWidth);
        const std::int64_t portion = times > 0 ? (all + times - 1) / times : 0;
        pairs = static_cast<int>(portion < 4 ? portion : 4);
    }
    FASTLLM_INLINE void write() {
        for (int i = 0; i < pairs && at + 2 * kWidth <= end; ++i, at += 2 * kWidth) {
            store_streaming(at, VecPair(broadcast(0.0f)), PairLanes{});
        }
    }
};

// e = exp(score - max); returns the sum. `next` are the elements that are read after these.
template <class Score, class T>
float to_exponentials(const Score& score, float* e, float max, const T* next, std::int64_t count,
                      Zeros<T>* zeros) {
    // With nothing but -inf any finite reference gives exp(score - reference) = 0.
    const float reference = max == no_score() ? 0.0f : max;
    const Vec from = broadcast(reference);
    Sum4 sums;
    const std::int64_t whole = count / kWidth * kWidth;
    for_each_pair(whole, [&](std::int64_t c, int slot, auto lanes) FASTLLM_LAMBDA {
        prefetch(next + c, lanes);
        if (zeros != nullptr) zeros->write();
        const auto v = exponential(score(c, lanes) - from);
        store(e + c, v, lanes);
        sums.add(slot, v);
    });
    float sum = sums.total();
    if (whole < count) {
        const FirstLanes lanes{static_cast<int>(count - whole)};
        store(e + whole, exponential(score(whole, lanes) - from), lanes);
        for (std::int64_t c = whole; c < count; ++c) sum += e[c];
    }
    return sum;
}

template <class T, bool kPlaces, bool kStream>
void store_scaled(const float* e, float by, T* y, std::int64_t count) {
    const Vec scale = broadcast(by);
    const auto body = [&](std::int64_t c, int, auto lanes) FASTLLM_LAMBDA {
        store_as<kStream>(y + c, load(e + c, lanes) * scale, lanes);
    };
    if constexpr (kPlaces) {
        for_each_vec(count, body);
    } else {
        for_each_pair(count, body);
    }
}

template <class T, bool kPlaces, bool kStream>
void softmax_row(const Scores<T>& s, T* y, std::int64_t places, Zeros<T>* zeros) {
    alignas(64) float buffer[kStretch];
    const auto inverse = [](float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; };
    if (places <= kStretch) {
        const auto score = scores_of<kPlaces>(s, buffer, 0, places);
        const float max = largest_of(score, places);
        const float sum = to_exponentials(score, buffer, max, s.next, places, zeros);
        return store_scaled<T, kPlaces, kStream>(buffer, inverse(sum), y, places);
    }
    float max = no_score();
    float sum = 0.0f;
    const auto length = [&](std::int64_t begin) {
        return places - begin < kStretch ? places - begin : kStretch;
    };
    for (std::int64_t begin = 0; begin < places; begin += kStretch) {
        const std::int64_t count = length(begin);
        const auto score = scores_of<kPlaces>(s, buffer, begin, count);
        const float here = largest_of(score, count);
        const float grown = here > max ? here : max;
        if (grown != max && sum != 0.0f) sum *= scalar_exp(max - grown);
        max = grown;
        sum += to_exponentials(score, buffer, max, s.x + begin + count, count, zeros);
    }
    for (std::int64_t begin = 0; begin < places; begin += kStretch) {
        const std::int64_t count = length(begin);
        const auto score = scores_of<kPlaces>(s, buffer, begin, count);
        to_exponentials(score, buffer, max, s.x + begin + count, count, zeros);
        store_scaled<T, kPlaces, kStream>(buffer, inverse(sum), y + begin, count);
    }
}

template <class T, bool kStream>
void zero(T* y, std::int64_t count) {
    for_each_pair(count, [&](std::int64_t c, int, auto lanes)
                             FASTLLM_LAMBDA { store_as<kStream>(y + c, broadcast(0.0f), lanes); });
}

template <class T>
void zero_from(T* y, std::int64_t begin, std::int64_t end, bool stream) {
    if (stream) {
        for (int i = 0; i < 64 && begin < end && !can_stream(y + begin); ++i) y[begin++] = T{};
        if (can_stream(y + begin)) return zero<T, true>(y + begin, end - begin);
    }
    zero<T, false>(y + begin, end - begin);
}

template <class T>
void fwd_rows(const SoftmaxFwd& a, std::int64_t begin, std::int64_t end, bool stream) {
    const bool places_matter = a.mask != nullptr || a.slopes != nullptr;
    for (std::int64_t row = begin; row < end; ++row) {
        const std::int64_t query = row % a.queries;
        const std::int64_t head = row / a.queries % a.heads;
        const std::int64_t batch = row / (a.queries * a.heads);
        T* y = static_cast<T*>(a.y) + row * a.cols;
        const T* x = static_cast<const T*>(a.x) + row * a.cols;
        Scores<T> s{x, x + a.cols, a.scale, nullptr, 0.0f, 0.0f};
        if (a.mask != nullptr) {
            s.mask = a.mask + batch * a.mask_batch_stride + head * a.mask_head_stride +
                     query * a.mask_query_stride;
        }
        if (a.slopes != nullptr) {
            s.slope = a.slopes[head];
            s.at_first = -s.slope * static_cast<float>(query + (a.cols - a.queries));
        }
        const std::int64_t places = a.causal ? causal_places(query, a.queries, a.cols) : a.cols;
        const bool go_around = stream && can_stream(y);
        auto* softmax =
            places_matter
                ? (go_around ? &softmax_row<T, true, true> : &softmax_row<T, true, false>)
                : (go_around ? &softmax_row<T, false, true> : &softmax_row<T, false, false>);
        if (go_around && places < a.cols) {
            Zeros<T> zeros(y + places, y + a.cols, places / (2 * kWidth));
            softmax(s, y, places, &zeros);
            zero<T, true>(zeros.at, zeros.end - zeros.at);
        } else {
            softmax(s, y, places, nullptr);
            zero_from(y, places, a.cols, stream);
        }
    }
    if (stream) finish_streaming();
}

template <class T>
float dot(const T* x, const T* y, std::int64_t count) {
    Sum4 sums;
    for_each_pair(count, [&](std::int64_t c, int slot, auto lanes) FASTLLM_LAMBDA {
        sums.add_product(slot, load(x + c, lanes), load(y + c, lanes));
    });
    return sums.total();
}

template <class T, bool kStream>
void gradient_row(const T* dy, const T* y, float mean, float scale, T* dx, std::int64_t cols,
                  std::int64_t count) {
    const T* next_dy = dy + cols;
    const T* next_y = y + cols;
    const Vec middle = broadcast(mean);
    const Vec by = broadcast(scale);
    for_each_pair(count, [&](std::int64_t c, int, auto lanes) FASTLLM_LAMBDA {
        prefetch(next_dy + c, lanes);
        prefetch(next_y + c, lanes);
        const auto v = (load(dy + c, lanes) - middle) * (load(y + c, lanes) * by);
        store_as<kStream>(dx + c, v, lanes);
    });
}

template <class T>
void bwd_rows(const SoftmaxBwd& a, std::int64_t begin, std::int64_t end, bool stream) {
    for (std::int64_t row = begin; row < end; ++row) {
        const T* dy = static_cast<const T*>(a.dy) + row * a.cols;
        const T* y = static_cast<const T*>(a.y) + row * a.cols;
        T* dx = static_cast<T*>(a.dx) + row * a.cols;
        const std::int64_t places =
            a.causal ? causal_places(row % a.queries, a.queries, a.cols) : a.cols;
        auto* gradient =
            stream && can_stream(dx) ? &gradient_row<T, true> : &gradient_row<T, false>;
        gradient(dy, y, dot(dy, y, places), a.scale, dx, a.cols, places);
        zero_from(dx, places, a.cols, stream);
    }
    if (stream) finish_streaming();
}

void fwd_any(const SoftmaxFwd& a, std::int64_t begin, std::int64_t end, bool stream) {
    with_element_type(a.dtype, [&](auto zero) FASTLLM_LAMBDA {
        fwd_rows<decltype(zero)>(a, begin, end, stream);
    });
}

void bwd_any(const SoftmaxBwd& a, std::int64_t begin, std::int64_t end, bool stream) {
    with_element_type(a.dtype, [&](auto zero) FASTLLM_LAMBDA {
        bwd_rows<decltype(zero)>(a, begin, end, stream);
    });
}

}  // namespace

const SoftmaxKernels softmax = {fwd_any, bwd_any};

}  // namespace fastllm::cpu::FASTLLM_ISA
