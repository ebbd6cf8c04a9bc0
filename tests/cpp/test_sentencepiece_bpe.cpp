#include "fastllm/error.hpp"
#include "fastllm/sentencepiece_bpe.hpp"
#include "test.hpp"

using namespace fastllm;

namespace {

// unk, two letters, merges ab and ▁ab, and optionally the 256 bytes.
SentencePieceModel tiny(bool byte_fallback) {
    SentencePieceModel model;
    model.algorithm = SentencePieceModel::bpe;
    model.byte_fallback = byte_fallback;
    model.remove_extra_whitespaces = false;
    model.pieces = {{"<unk>", 0, PieceType::unknown}, {"<s>", 0, PieceType::control}};
    if (byte_fallback) {
        for (int b = 0; b < 256; ++b) {
            char text[8];
            std::snprintf(text, sizeof text, "<0x%02X>", b);
            model.pieces.push_back({text, 0, PieceType::byte});
        }
    }
    float score = 0;
    for (const char* piece : {"ab",
                              "\xE2\x96\x81"
                              "ab",
                              "a", "b", "\xE2\x96\x81"})
        model.pieces.push_back({piece, score--, PieceType::normal});
    return model;
}

std::vector<uint32_t> encode(const SentencePieceModel& model, std::string_view text) {
    const SentencePieceBpe encoder(model);
    IdBuffer ids;
    std::vector<size_t> ends;
    encoder.thread()->encode({text}, ids, ends);
    return {ids.data(), ids.data() + ids.size()};
}

}  // namespace

TEST(merges_by_score) {
    const auto model = tiny(false);
    CHECK_EQ(encode(model, "abab b"), (std::vector<uint32_t>{3, 2, 6, 5}));
    CHECK_EQ(encode(model, ""), std::vector<uint32_t>{});
}

TEST(a_literal_space_symbol_is_a_space) {
    CHECK_EQ(encode(tiny(false),
                    "\xE2\x96\x81"
                    "ab"),
             (std::vector<uint32_t>{6, 3}));
}

TEST(unknown_characters_become_one_id_or_bytes) {
    CHECK_EQ(encode(tiny(false), "xyza"), (std::vector<uint32_t>{6, 0, 4}));
    CHECK_EQ(encode(tiny(true), "\xC3\xA9"), (std::vector<uint32_t>{262, 2 + 0xC3, 2 + 0xA9}));
}

TEST(user_defined_pieces_match_first_and_longest) {
    auto model = tiny(false);
    model.pieces.push_back({"b", 0, PieceType::user_defined});
    model.pieces[5].text = "c";  // b is a user-defined piece now
    model.pieces.push_back({"bb", 0, PieceType::user_defined});
    CHECK_EQ(encode(model, "abbba"), (std::vector<uint32_t>{6, 4, 8, 7, 4}));
}

TEST(removes_extra_whitespace) {
    auto model = tiny(false);
    model.remove_extra_whitespaces = true;
    CHECK_EQ(encode(model, "  ab   b  "), (std::vector<uint32_t>{3, 6, 5}));
    CHECK_EQ(encode(model, "   "), std::vector<uint32_t>{});
}

TEST(refuses_models_that_it_cannot_stand_for) {
    auto model = tiny(false);
    CHECK_EQ(SentencePieceBpe::unsupported(model), "");
    model.algorithm = SentencePieceModel::unigram;
    CHECK_THROWS(SentencePieceBpe{model}, "not of type BPE");
    model = tiny(true);
    model.pieces[40].text = "<0xZZ>";
    CHECK_THROWS(SentencePieceBpe{model}, "lacks");
    model = tiny(false);
    model.charsmap = "abc";
    CHECK_THROWS(SentencePieceBpe{model}, "character map");
}

TEST(a_model_file_cut_short_is_refused) {
    CHECK_THROWS(SentencePieceModel::parse(""), "no pieces");
    CHECK_THROWS(SentencePieceModel::parse("\x0a\x20short"), "cut short");
    CHECK_THROWS(SentencePieceModel::parse("{\"model\": 1}"), "SentencePiece model");
}

TEST_MAIN()
