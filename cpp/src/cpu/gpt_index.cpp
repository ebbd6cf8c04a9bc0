#include "fastllm/gpt_index.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace fastllm {
namespace {

constexpr size_t kAhead = 32;  // documents whose lengths are prefetched: they lie anywhere

void require_sequence(int32_t number, size_t sequences) {
    if (number < 0 || size_t(number) >= sequences)
        throw std::invalid_argument("a document number names a sequence that does not exist");
}

}  // namespace

int64_t count_tokens(const int32_t* lengths, size_t sequences, const int32_t* documents,
                     size_t count) {
    int64_t total = 0;
    for (size_t d = 0; d < count; ++d) {
        require_sequence(documents[d], sequences);
        total += lengths[documents[d]];
    }
    return total;
}

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
        if (d + kAhead < documents)
            __builtin_prefetch(lengths + uint32_t(document_index[d + kAhead]));
        const int32_t sequence = document_index[d];
        require_sequence(sequence, sequences);
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

template void build_sample_index<int32_t>(const int32_t*, size_t, const int32_t*, size_t, int64_t,
                                          int, size_t, int32_t*);
template void build_sample_index<int64_t>(const int32_t*, size_t, const int32_t*, size_t, int64_t,
                                          int, size_t, int64_t*);
template void build_shuffle_index<uint32_t>(size_t, size_t, LegacyRandom&, uint32_t*);
template void build_shuffle_index<int64_t>(size_t, size_t, LegacyRandom&, int64_t*);

}  // namespace fastllm
