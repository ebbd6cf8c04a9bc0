#include "fastllm/gpt_sample.hpp"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>

namespace fastllm {
namespace {

template <class T>
T load(const char* array, size_t i) {
    T value;
    std::memcpy(&value, array + i * sizeof(T), sizeof(T));
    return value;
}

template <class Token>
void widen(const char* from, size_t count, int64_t* out) {
    const auto* const ids = reinterpret_cast<const Token*>(from);
    for (size_t i = 0; i < count; ++i) out[i] = ids[i];
}

// Copies up to `room` tokens of the documents between two points; returns how many. `ends`, if not
// null, receives where each document's part ends.
size_t gather(const SampleSource& s, const int32_t* document_index, size_t documents,
              SamplePoint from, SamplePoint to, int extra, int64_t* out, size_t room,
              std::vector<int32_t>* ends) {
    if (from.document < 0 || to.document < from.document || size_t(to.document) >= documents)
        throw std::out_of_range("a sample's documents are not in the document index");
    size_t count = 0;
    for (int64_t d = from.document; d <= to.document; ++d) {
        const auto sequence = size_t(document_index[d]);
        if (sequence >= s.sequences)
            throw std::out_of_range("the document index names no sequence");
        const int64_t length = load<int32_t>(s.lengths, sequence);
        const int64_t begin = d == from.document ? from.offset : 0;
        const int64_t end = d == to.document ? to.offset + extra : length;
        if (begin < 0 || end < begin || end > length)
            throw std::out_of_range("a sample leaves its document");
        const auto tokens = size_t(end - begin);
        const int64_t at = load<int64_t>(s.offsets, sequence) + begin * int64_t(s.item_size);
        if (at < 0 || size_t(at) > s.bin.size() || tokens * s.item_size > s.bin.size() - size_t(at))
            throw std::out_of_range("a sample leaves the .bin file");
        if (tokens > room - count) throw std::out_of_range("a sample is longer than seq_length");
        if (s.item_size == 2)
            widen<uint16_t>(s.bin.data() + at, tokens, out + count);
        else
            widen<int32_t>(s.bin.data() + at, tokens, out + count);
        count += tokens;
        if (ends && tokens > 0) ends->push_back(int32_t(count));
    }
    return count;
}

// From the ends of the documents' parts, among seq_length + extra tokens, to the boundaries among
// seq_length of them.
void to_boundaries(std::vector<int32_t>& ends, int32_t length) {
    while (!ends.empty() && ends.back() >= length) ends.pop_back();
    ends.push_back(length);
    ends.insert(ends.begin(), 0);
}

void write_positions(const SampleRules& rules, const SampleOutput& out) {
    const auto length = size_t(rules.seq_length);
    if (rules.packed) {
        const std::vector<int32_t>& bounds = *out.boundaries;
        for (size_t part = 0; part + 1 < bounds.size(); ++part)
            for (int32_t i = bounds[part]; i < bounds[part + 1]; ++i)
                out.position_ids[i] = i - bounds[part];
    } else {
        for (size_t i = 0; i < length; ++i) out.position_ids[i] = int64_t(i);
    }
    if (!rules.reset_position_ids) return;
    int64_t start = 0;
    for (size_t i = 0; i < length; ++i) {
        if (out.position_ids[i] == 0) start = 0;
        out.position_ids[i] -= start;
        if (out.tokens[i] == rules.eod_id) start = out.position_ids[i] + start + 1;
    }
}

}  // namespace

void read_sample(const SampleSource& source, const int32_t* document_index, size_t documents,
                 SamplePoint from, SamplePoint to, const SampleRules& rules,
                 const SampleOutput& out) {
    const auto length = size_t(rules.seq_length);
    const size_t room = length + size_t(rules.extra);
    int64_t* const tokens = out.tokens;
    int64_t* const labels = out.labels;
    float* const loss_mask = out.loss_mask;
    thread_local std::unique_ptr<int64_t[]> item;
    thread_local size_t item_size = 0;
    if (item_size < room) {
        item.reset(new int64_t[room]);
        item_size = room;
    }
    if (rules.packed) out.boundaries->clear();
    const size_t got = gather(source, document_index, documents, from, to, rules.extra, item.get(),
                              room, rules.packed ? out.boundaries : nullptr);
    std::fill(item.get() + got, item.get() + room, rules.pad_id);
    std::memcpy(tokens, item.get(), length * sizeof(int64_t));
    if (rules.extra) {
        std::memcpy(labels, item.get() + 1, length * sizeof(int64_t));
    } else {
        std::memcpy(labels, item.get() + 1, (length - 1) * sizeof(int64_t));
        labels[length - 1] = rules.pad_id;
    }
    for (size_t i = 0; i < length; ++i) loss_mask[i] = labels[i] == rules.pad_id ? 0.0f : 1.0f;
    if (rules.eod_mask_loss)
        for (size_t i = 0; i < length; ++i)
            if (tokens[i] == rules.eod_id) loss_mask[i] = 0.0f;
    if (rules.packed) {
        for (const int32_t end : *out.boundaries)
            if (size_t(end) <= length) loss_mask[end - 1] = 0.0f;
        to_boundaries(*out.boundaries, int32_t(length));
    }
    write_positions(rules, out);
    // Padding must be an id that the embedding has.
    for (size_t i = 0; i < length; ++i) {
        if (tokens[i] == rules.pad_id) tokens[i] = 0;
        if (labels[i] == rules.pad_id) labels[i] = 0;
    }
}

}  // namespace fastllm
