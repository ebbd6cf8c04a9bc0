// Which dataset of a blend each sample comes from, as in Megatron-Core's BlendedDataset.
//
// The rule: sample t comes from the dataset that is furthest behind its weight: the one of largest
// error weights[j]·max(t, 1) − (samples drawn from j), the first one on ties, in float64 as
// written, without fused multiply-add.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastllm {

// Fills `samples` entries: the dataset of sample t, and the number of that dataset's sample.
//
// Weights are not negative and sum to about 1. Time O(samples + datasets) for weights that differ,
// or are equal, and O(samples · datasets) at worst. Large blends use up to so many threads; the
// result is the same for any number.
void build_blend(const double* weights, size_t datasets, size_t samples, int16_t* dataset_index,
                 int64_t* dataset_sample_index, int threads);

// The same rule with the sizes' shares as weights and without replacement: dataset j has sizes[j]
// samples and then leaves. Fills as many entries as there are samples in all.
void build_exhaustive_blend(const int64_t* sizes, size_t datasets, int16_t* dataset_index,
                            int64_t* dataset_sample_index, int threads);

}  // namespace fastllm
