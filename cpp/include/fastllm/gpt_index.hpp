// The indices of Megatron-Core's GPTDataset and BlendedDataset, value for value.
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

    template <class T>
    void shuffle(T* items, size_t count) {
        for (size_t i = count; i-- > 1;) std::swap(items[i], items[below_or_equal(i)]);
    }

  private:
    // Uniform in [0, max]: masked draws until one is not above max.
    uint64_t below_or_equal(uint64_t max) {
        uint64_t mask = max;
        for (int shift = 1; shift < 64; shift *= 2) mask |= mask >> shift;
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

// Sample t comes from the dataset that is furthest behind its weight: the largest
// weights[j]·max(t, 1) − (samples drawn from j), the first one on ties.
void build_blend(const double* weights, size_t datasets, size_t samples, int16_t* dataset_index,
                 int64_t* dataset_sample_index);

// The same rule without replacement: dataset j has sizes[j] samples and then leaves; draws all of
// them.
void build_exhaustive_blend(const int64_t* sizes, size_t datasets, int16_t* dataset_index,
                            int64_t* dataset_sample_index);

}  // namespace fastllm
