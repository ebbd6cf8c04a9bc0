// An exact, fast encoder for byte-level BPE: GPT-2, Llama-3, Qwen, tiktoken files, tokenizer.json.
//
// Text is cut by the pre-tokenizer's expression; each piece is merged alone, starting from its
// bytes. Two bytes that are neighbours in no token never end up in one, so pieces may be cut there,
// too. Pieces repeat, so most are answered by a cache.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "fastllm/bpe_merge.hpp"
#include "fastllm/encoder.hpp"
#include "fastllm/pretokenizer.hpp"

namespace fastllm {

struct ByteLevelModel {
    // The bytes of each id; empty for ids that merging never gives.
    std::vector<std::string> tokens;
    // Pairs of ids in the order in which they merge. Empty: any two neighbours merge whose bytes
    // together are a token, the lowest id first (tiktoken).
    std::vector<std::pair<uint32_t, uint32_t>> merges;
    bool merges_by_rank = false;  // `merges` is empty on purpose
    bool ignore_merges = false;   // a piece that is a token is that token, whatever the merges say
    Pretokenizer pretokenizer{};
    // Texts that become one id wherever they occur, the longest first.
    std::vector<std::pair<std::string, uint32_t>> special;
};

class ByteLevelBpe : public Encoder {
  public:
    // Throws InputError if a byte has no token, or a merge names none.
    explicit ByteLevelBpe(ByteLevelModel model);

    std::unique_ptr<EncoderThread> thread() const override;
    uint32_t vocab_size() const override { return vocab_size_; }

  private:
    friend class ByteLevelBpeThread;
    using IdOf = std::unordered_map<std::string_view, uint32_t>;
    void add_listed_merges(const IdOf& id_of);
    void add_ranked_merges(const IdOf& id_of);
    std::vector<uint32_t> by_size() const;
    void find_unmerged(const IdOf& id_of);
    void symbols_of(std::string_view text, std::vector<uint32_t>& symbols) const;

    ByteLevelModel model_;
    uint32_t vocab_size_ = 0;
    uint32_t byte_ids_[256];
    MergeTable merges_;
    std::vector<uint8_t>
        joined_;  // whether bytes a and b, at a * 256 + b, are neighbours in a token
    std::vector<uint32_t> byte_pairs_;  // the merge of bytes a and b, at a * 256 + b
    // With `ignore_merges`: the tokens that merging does not give, but that whole pieces are. Then
    // pieces are not cut, as a part of one may look like such a token.
    std::unordered_map<std::string_view, uint32_t> unmerged_;
    bool cuts_pieces_ = false;
    bool special_starts_[256] = {};
};

}  // namespace fastllm
