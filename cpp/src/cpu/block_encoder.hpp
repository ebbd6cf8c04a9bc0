// One worker's job: the lines of a block → tokens, lengths, documents.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "fastllm/dataset_builder.hpp"
#include "fastllm/json.hpp"

namespace fastllm {

struct BlockOutput {
    std::vector<char> tokens;  // in the file's type
    std::vector<int32_t> lengths;
    std::vector<uint32_t> sequences_per_document;
};

struct BlockResult {
    std::vector<BlockOutput> outputs;  // one per key
    std::vector<BadLine> bad;          // `line` counts from 1 within the block; no source
    BuildCounts counts;
    void clear();
};

class BlockEncoder {
  public:
    BlockEncoder(const BuildOptions& options, EncoderThread& encoder);

    // `text`: whole lines. With stop_on_error, reads no further than the first bad line.
    void encode(std::string_view text, BlockResult& result);

  private:
    // The texts of one key, in order, and how many belong to each document.
    struct KeyTexts {
        std::vector<std::string_view> texts;
        std::vector<uint32_t> per_document;
    };

    void read_lines(std::string_view block, BlockResult& result);
    void read_json(std::string_view line);
    void read_text(std::string_view line);
    std::string_view keep(std::string_view text, std::string_view line);
    void write_documents(const KeyTexts& key, BlockOutput& out, BuildCounts& counts);
    void append_ids(const uint32_t* ids, size_t count, std::vector<char>& out) const;

    const BuildOptions& options_;
    EncoderThread& encoder_;
    JsonLine json_;
    std::vector<KeyTexts> keys_;
    std::string arena_;  // decoded texts; reserved once per block, so that views of it stay valid
    IdBuffer ids_;
    std::vector<size_t> ends_;
};

}  // namespace fastllm
