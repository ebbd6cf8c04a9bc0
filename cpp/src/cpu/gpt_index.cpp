#include "fastllm/gpt_index.hpp"

#include <algorithm>
#include <functional>
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

namespace {

// Steps for which one choice of candidates is kept, and how many more candidates than steps to
// keep.
constexpr size_t kWindow = 128;
constexpr size_t kSpare = 64;

// The rule itself, over all datasets: step t of the blend.
size_t furthest_behind(const double* weights, const double* drawn, size_t datasets, double x) {
    size_t best = 0;
    double best_error = weights[0] * x - drawn[0];
    for (size_t j = 1; j < datasets; ++j) {
        const double error = weights[j] * x - drawn[j];
        if (error > best_error) {
            best = j;
            best_error = error;
        }
    }
    return best;
}

// The datasets that can be furthest behind in the next steps, in rising order, and a bound: no
// other dataset's error reaches `bound` at any step up to `last`. Errors only rise between draws,
// so those at `last` bound all before. Correct for any choice; a good one keeps few candidates and
// a low bound.
struct Candidates {
    std::vector<size_t> datasets;
    std::vector<double> weights, drawn;
    double bound = 0;

    void choose(const double* all_weights, const std::vector<double>& all_drawn, double last) {
        const size_t count = all_drawn.size();
        errors_.resize(count);
        for (size_t j = 0; j < count; ++j) errors_[j] = all_weights[j] * last - all_drawn[j];
        sorted_ = errors_;
        const size_t keep = std::min(count, kWindow + kSpare);
        std::nth_element(sorted_.begin(), sorted_.begin() + std::ptrdiff_t(keep - 1), sorted_.end(),
                         std::greater<double>());
        bound = sorted_[keep - 1];
        datasets.clear();
        weights.clear();
        drawn.clear();
        for (size_t j = 0; j < count; ++j) {
            if (errors_[j] < bound) continue;
            datasets.push_back(j);
            weights.push_back(all_weights[j]);
            drawn.push_back(all_drawn[j]);
        }
    }

  private:
    std::vector<double> errors_, sorted_;
};

}  // namespace

// With D datasets the rule takes D steps a sample. Here a few hundred datasets are chosen that
// alone can be drawn next, and the rule runs over them until their best error falls to the bound of
// the others: the same sample for sample, ties included, as a dataset at the bound is itself a
// candidate.
void build_blend(const double* weights, size_t datasets, size_t samples, int16_t* dataset_index,
                 int64_t* dataset_sample_index) {
    std::vector<double> drawn(datasets, 0.0);  // exact: counts stay far below 2^53
    const auto take = [&](size_t t, size_t j) {
        dataset_index[t] = int16_t(j);
        dataset_sample_index[t] = int64_t(drawn[j]);
        drawn[j] += 1.0;
    };
    Candidates candidates;
    for (size_t t = 0; t < samples;) {
        if (datasets <= 2 * (kWindow + kSpare)) {
            take(t, furthest_behind(weights, drawn.data(), datasets, std::max(double(t), 1.0)));
            ++t;
            continue;
        }
        const size_t stop = std::min(samples, t + kWindow);
        candidates.choose(weights, drawn, std::max(double(stop - 1), 1.0));
        const size_t first = t;
        for (; t < stop; ++t) {
            const double x = std::max(double(t), 1.0);
            const size_t i = furthest_behind(candidates.weights.data(), candidates.drawn.data(),
                                             candidates.datasets.size(), x);
            if (candidates.weights[i] * x - candidates.drawn[i] < candidates.bound) break;
            take(t, candidates.datasets[i]);
            candidates.drawn[i] += 1.0;
        }
        if (t == first) {  // the others may be ahead at once: one step by the rule itself
            take(t, furthest_behind(weights, drawn.data(), datasets, std::max(double(t), 1.0)));
            ++t;
        }
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
