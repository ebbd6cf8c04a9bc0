// The indices of Megatron-Core's GPTDataset, value for value.
//
// document_index  the split's documents, once per epoch, shuffled
// sample_index    row k: where sample k starts, as (position in document_index, token in that
// document) shuffle_index   the order in which samples are drawn
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <utility>

namespace fastllm {

// numpy.random.RandomState(seed).shuffle on one-dimensional arrays.
class LegacyRandom {
  public:
    explicit LegacyRandom(uint32_t seed) : engine_(seed) {}

    // The numbers drawn do not depend on the items, so they are drawn some steps ahead of the swaps
    // and what they name is prefetched: a large array is swapped at memory speed, not latency.
    template <class T>
    void shuffle(T* items, size_t count) {
        constexpr size_t kAhead = 64;
        size_t drawn[kAhead];
        for (size_t i = count; i > 1;) {
            const size_t steps = i - 1 < kAhead ? i - 1 : kAhead;
            for (size_t k = 0; k < steps; ++k) {
                drawn[k] = below_or_equal(i - 1 - k);
                __builtin_prefetch(&items[drawn[k]], 1);
            }
            for (size_t k = 0; k < steps; ++k) std::swap(items[i - 1 - k], items[drawn[k]]);
            i -= steps;
        }
    }

  private:
    // Uniform in [0, max] for max > 0: masked draws until one is not above max.
    uint64_t below_or_equal(uint64_t max) {
        const uint64_t mask = ~uint64_t(0) >> __builtin_clzll(max);
        uint64_t value;
        if (max <= 0xFFFFFFFFull) {
            while ((value = engine_() & mask) > max) {
            }
        } else {
            do {
                const uint64_t high = engine_();
                value = (high << 32 | engine_()) & mask;
            } while (value > max);
        }
        return value;
    }

    std::mt19937 engine_;  // seeds and draws as numpy's MT19937 does
};

// Tokens of the sequences that `documents` names, in all. Throws std::invalid_argument if a number
// is not below `sequences`.
int64_t count_tokens(const int32_t* lengths, size_t sequences, const int32_t* documents,
                     size_t count);

// Fills document_index: `documents` tiled `epochs` times and shuffled, the last epoch apart if
// `separate`.
void build_document_index(const int32_t* documents, size_t count, size_t epochs, bool separate,
                          LegacyRandom& random, int32_t* document_index);

// Fills `samples` + 1 rows of sample_index (Index: int32_t or int64_t).
//
// `lengths[d]`: tokens of sequence d. Sample k covers tokens [k·seq_length, (k+1)·seq_length +
// extra) of the stream of documents, `extra` being 0 or 1. Row k > 0 names the document that holds
// the last token of sample k − 1. Rows beyond the last token name the end of the last document.
// Throws std::invalid_argument if a document number is not below `sequences`.
template <class Index>
void build_sample_index(const int32_t* lengths, size_t sequences, const int32_t* document_index,
                        size_t documents, int64_t seq_length, int extra, size_t samples,
                        Index* sample_index);

// Fills shuffle_index: 0 … samples − 1 shuffled, those from `first_part` on apart (first_part =
// samples: all together). Draws from `random` what numpy would, after build_document_index.
template <class Index>
void build_shuffle_index(size_t first_part, size_t samples, LegacyRandom& random,
                         Index* shuffle_index);

}  // namespace fastllm
