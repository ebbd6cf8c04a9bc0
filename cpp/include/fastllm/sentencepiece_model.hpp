// A SentencePiece `.model` file: the fields of its protocol buffer that encoding needs.
// Field numbers: sentencepiece_model.proto of google/sentencepiece.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace fastllm {

enum class PieceType {
    normal = 1,
    unknown = 2,
    control = 3,
    user_defined = 4,
    unused = 5,
    byte = 6
};

struct Piece {
    std::string text;
    float score = 0;
    PieceType type = PieceType::normal;
};

struct SentencePieceModel {
    enum Algorithm { unigram = 1, bpe = 2, word = 3, character = 4 };

    std::vector<Piece> pieces;
    int algorithm = unigram;
    bool byte_fallback = false;
    bool treat_whitespace_as_suffix = false;
    bool add_dummy_prefix = true;
    bool remove_extra_whitespaces = true;
    bool escape_whitespaces = true;
    std::string charsmap;  // compiled normalization rules; empty: identity
    std::string unk_piece = "<unk>", bos_piece = "<s>", eos_piece = "</s>";

    // Id of a piece of type control, unknown, or any; -1 if there is none of that text.
    int find(std::string_view text) const;

    // Reads the bytes of a model file. Throws InputError if they are cut short or not such a file.
    static SentencePieceModel parse(std::string_view bytes);
};

}  // namespace fastllm
