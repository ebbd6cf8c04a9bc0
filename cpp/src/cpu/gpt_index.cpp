#include "fastllm/gpt_index.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <vector>

namespace fastllm {

void build_document_index(const int32_t* documents, size_t count, size_t epochs, bool separate,
                          LegacyRandom& random, int32_t* document_index) {
    for (size_t epoch = 0; epoch < epochs; ++epoch)
        std::copy(documents, documents + count, document_index + epoch * count);
    const size_t together = separate ? (epochs - 1) * count : epochs * count;
    random.shuffle(document_index, together);
    random.shuffle(document_index + together, epochs * count - together);
}

template <class Index>
void build_sample_index(const int32_t* lengths, size_t sequences, const int32_t* document_index,
                        size_t documents, int64_t seq_length, int extra, size_t samples,
                        Index* sample_index) {
    sample_index[0] = 0;
    sample_index[1] = 0;
    size_t row = 1;
    int64_t before = 0;                       // tokens in the documents before d
    int64_t wanted = seq_length + extra - 1;  // last token of sample row − 1
    for (size_t d = 0; d < documents && row <= samples; ++d) {
        const int32_t sequence = document_index[d];
        if (sequence < 0 || size_t(sequence) >= sequences)
            throw std::invalid_argument("document_index names a sequence that does not exist");
        const int64_t end = before + lengths[sequence];
        for (; wanted < end && row <= samples; ++row, wanted += seq_length) {
            sample_index[2 * row] = Index(d);
            sample_index[2 * row + 1] = Index(wanted - before + 1 - extra);
        }
        before = end;
    }
    for (; row <= samples; ++row) {
        sample_index[2 * row] = Index(documents - 1);
        sample_index[2 * row + 1] = Index(lengths[document_index[documents - 1]] - extra);
    }
}

template <class Index>
void build_shuffle_index(size_t first_part, size_t samples, LegacyRandom& random,
                         Index* shuffle_index) {
    std::iota(shuffle_index, shuffle_index + samples, Index(0));
    random.shuffle(shuffle_index, first_part);
    random.shuffle(shuffle_index + first_part, samples - first_part);
}

void build_blend(const double* weights, size_t datasets, size_t samples, int16_t* dataset_index,
                 int64_t* dataset_sample_index) {
    std::vector<int64_t> drawn(datasets, 0);
    for (size_t t = 0; t < samples; ++t) {
        const double x = std::max(double(t), 1.0);
        size_t best = 0;
        double best_error = weights[0] * x - double(drawn[0]);
        for (size_t j = 1; j < datasets; ++j) {
            const double error = weights[j] * x - double(drawn[j]);
            if (error > best_error) {
                best = j;
                best_error = error;
            }
        }
        dataset_index[t] = int16_t(best);
        dataset_sample_index[t] = drawn[best]++;
    }
}

void build_exhaustive_blend(const int64_t* sizes, size_t datasets, int16_t* dataset_index,
                            int64_t* dataset_sample_index) {
    int64_t total = 0;
    for (size_t j = 0; j < datasets; ++j) total += sizes[j];
    std::vector<size_t> alive;
    std::vector<double> weights(datasets);
    for (size_t j = 0; j < datasets; ++j) {
        weights[j] = double(sizes[j]) / double(total);
        if (sizes[j] > 0) alive.push_back(j);
    }
    std::vector<int64_t> drawn(datasets, 0);
    for (int64_t t = 0; t < total; ++t) {
        const double x = std::max(double(t), 1.0);
        size_t best = 0;
        double best_error = weights[alive[0]] * x - double(drawn[alive[0]]);
        for (size_t i = 1; i < alive.size(); ++i) {
            const double error = weights[alive[i]] * x - double(drawn[alive[i]]);
            if (error > best_error) {
                best = i;
                best_error = error;
            }
        }
        const size_t j = alive[best];
        dataset_index[t] = int16_t(j);
        dataset_sample_index[t] = drawn[j]++;
        if (drawn[j] == sizes[j]) alive.erase(alive.begin() + std::ptrdiff_t(best));
    }
}

template void build_sample_index<int32_t>(const int32_t*, size_t, const int32_t*, size_t, int64_t,
                                          int, size_t, int32_t*);
template void build_sample_index<int64_t>(const int32_t*, size_t, const int32_t*, size_t, int64_t,
                                          int, size_t, int64_t*);
template void build_shuffle_index<uint32_t>(size_t, size_t, LegacyRandom&, uint32_t*);
template void build_shuffle_index<int64_t>(size_t, size_t, LegacyRandom&, int64_t*);

}  // namespace fastllm
