// An exact, fast encoder for SentencePiece BPE models (LLaMA, Mistral, …).
//
// Two code points that are adjacent in no piece of the vocabulary can never end up in one token, so
// the text may be cut between them and each chunk encoded alone. Chunks repeat, so most are
// answered by a cache; the rest go through the same merges, in the same order, as in SentencePiece.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "fastllm/bpe_merge.hpp"
#include "fastllm/encoder.hpp"
#include "fastllm/sentencepiece_model.hpp"
#include "fastllm/sentencepiece_normalizer.hpp"

namespace fastllm {

class SentencePieceBpe : public Encoder {
  public:
    // Why this encoder cannot stand for SentencePiece on this model; empty if it can.
    static std::string unsupported(const SentencePieceModel& model);

    // Throws InputError for a model that unsupported() refuses.
    explicit SentencePieceBpe(const SentencePieceModel& model);

    std::unique_ptr<EncoderThread> thread() const override;
    uint32_t vocab_size() const override { return vocab_size_; }

  private:
    friend class SentencePieceBpeThread;

    // What is known of a code point. Symbols below vocab_size_ are pieces; above, characters that
    // occur in pieces but are none themselves.
    struct Character {
        uint32_t symbol = kUnknown;
        bool joins_right = false;  // occurs in a piece with something after it
        bool joins_left = false;   // occurs in a piece with something before it
    };
    struct UserSymbol {
        std::string text;
        uint32_t id;
    };
    static constexpr uint32_t kUnknown = 0xFFFFFFFFu;
    static constexpr uint32_t kPage = 256;

    const Character& character(uint32_t cp) const {
        return characters_[size_t(page_of_[cp / kPage]) * kPage + cp % kPage];
    }
    Character& character_for_write(uint32_t cp);
    bool joined(uint32_t left, uint32_t right) const;
    void add_piece_characters(const std::string& text);
    void add_merges(const SentencePieceModel& model,
                    const std::unordered_map<std::string, uint32_t>& pieces);

    SentencePieceNormalizer normalizer_;
    uint32_t vocab_size_;
    bool byte_fallback_;
    uint32_t unk_id_ = 0;
    uint32_t byte_ids_[256] = {};
    std::vector<uint16_t> page_of_;  // code point / 256 → page; page 0 is all unknown
    std::vector<Character> characters_;
    std::vector<uint32_t> pseudo_symbols_;  // code points of the symbols from vocab_size_ on
    bool ascii_joined_[128][128] = {};
    std::vector<uint64_t> pairs_;  // hash set of left << 32 | right, open addressing; ~0: empty
    size_t pairs_mask_ = 0;
    MergeTable merges_;
    std::vector<UserSymbol> user_symbols_[256];  // by first byte, longest first
    bool has_user_symbols_ = false;
};

}  // namespace fastllm
