// One training item of a GPTDataset: tokens, labels, loss mask, position ids.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace fastllm {

// How items are cut and masked; see fastllm_data.gpt_dataset.SampleOptions.
struct SampleRules {
    int64_t seq_length = 0;
    int extra = 1;        // 1: the last label is the token after the item
    int64_t pad_id = -1;  // fills an item that is not full; -1 is written as 0
    int64_t eod_id = -1;
    bool eod_mask_loss = false;
    bool reset_position_ids = false;
    // Positions restart with each document, a label of another document has no loss, and the
    // documents' boundaries are given.
    bool packed = false;
};

// The files of an indexed dataset as they are mapped: lengths and offsets need not be aligned.
struct SampleSource {
    std::string_view bin;
    const char* lengths;  // i32[sequences]
    const char* offsets;  // i64[sequences], bytes
    size_t sequences;
    size_t item_size;  // 2: uint16, 4: int32
};

// Where an item starts or ends: a position in document_index, and a token in that document.
struct SamplePoint {
    int64_t document;
    int64_t offset;
};

// Where an item goes: seq_length values each, and, if rules.packed, the rising boundaries of the
// documents' parts in it, from 0 to seq_length (cu_seqlens); padding counts as a part.
struct SampleOutput {
    int64_t* tokens;
    int64_t* labels;
    float* loss_mask;
    int64_t* position_ids;
    std::vector<int32_t>* boundaries;
};

// Throws std::out_of_range if an index leads outside the files.
void read_sample(const SampleSource& source, const int32_t* document_index, size_t documents,
                 SamplePoint from, SamplePoint to, const SampleRules& rules,
                 const SampleOutput& out);

}  // namespace fastllm
