// Hand-written scanners for the regular expressions that byte-level BPE tokenizers split text by.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "fastllm/unicode_class.hpp"

namespace fastllm {

// The families of expressions. `digits` below is how many \p{N} make one piece.
enum class PretokenPattern {
    // 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
    gpt2,
    // (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,digits}|
    // ?[^\s\p{L}\p{N}]+[\r\n]*|
    // \s*[\r\n]+|\s+(?!\S)|\s+                       digits = 3: cl100k, Llama-3; 1: Qwen2
    cl100k,
    // [^\r\n\p{L}\p{N}]?U*L+(?i:'s|…)?|[^\r\n\p{L}\p{N}]?U+L*(?i:'s|…)?|\p{N}{1,digits}|
    // ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+
    // with U = [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}], L = [\p{Ll}\p{Lm}\p{Lo}\p{M}]
    //                       digits = 3: o200k, Llama-4; without the contractions and digits = 1:
    //                       tekken
    o200k,
};

struct Pretokenizer {
    PretokenPattern pattern;
    int digits = 3;
    bool contractions = true;

    // Bytes that must be readable from a piece's start on, even past `end`.
    static constexpr size_t kReadable = 18;

    // End of the piece that starts at p (p < end, valid UTF-8).
    const uint8_t* next(const uint8_t* p, const uint8_t* end) const;

    // The scanner of a regular expression written in one of the known ways, if it is one.
    static std::optional<Pretokenizer> from_regex(const std::string& expression);

  private:
    const uint8_t* next_gpt2(const uint8_t* p, const uint8_t* end) const;
    const uint8_t* next_cl100k(const uint8_t* p, const uint8_t* end) const;
    const uint8_t* next_o200k(const uint8_t* p, const uint8_t* end) const;
    const uint8_t* numbers(const uint8_t* p, const uint8_t* end) const;

    const UnicodeTable* table_ = &unicode_table();
};

}  // namespace fastllm
