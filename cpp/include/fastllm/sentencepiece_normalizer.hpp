// SentencePiece's text normalization: character map, whitespace removal, dummy prefix.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "fastllm/sentencepiece_model.hpp"

namespace fastllm {

class SentencePieceNormalizer {
  public:
    // Throws InputError if the model's character map is malformed.
    explicit SentencePieceNormalizer(const SentencePieceModel& model);

    // True if normalizing is: put a space in front (or nothing), and change no other byte.
    bool only_adds_prefix() const { return units_.empty() && !remove_extra_whitespaces_; }
    bool adds_prefix() const { return add_dummy_prefix_; }

    // Normalizes valid UTF-8. A space stands where SentencePiece writes U+2581; a U+2581 that the
    // text itself holds becomes a space too, as the two cannot be told apart afterwards.
    void normalize(std::string_view text, std::string& out) const;

  private:
    // Longest rule at the start of `text`: its replacement and how many bytes it replaces; else the
    // first character itself.
    std::pair<std::string_view, size_t> next(std::string_view text) const;

    std::vector<uint32_t> units_;  // double-array trie
    std::string replacements_;     // NUL-terminated strings
    bool add_dummy_prefix_;
    bool remove_extra_whitespaces_;
};

}  // namespace fastllm
