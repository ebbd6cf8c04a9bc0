#include <algorithm>
#include <random>

#include "fastllm/bytelevel_bpe.hpp"
#include "fastllm/error.hpp"
#include "test.hpp"

using namespace fastllm;

namespace {

// All bytes, and tokens that are joined of earlier ones at random.
ByteLevelModel random_model(std::mt19937& random) {
    ByteLevelModel model;
    for (int byte = 0; byte < 256; ++byte) model.tokens.push_back(std::string(1, char(byte)));
    const std::string seeds = "ab \xE4\xB8\xA5\xE3\x81\x82\xC3\xA9";
    std::vector<std::string> parts;
    for (const char c : seeds) parts.push_back(std::string(1, c));
    while (model.tokens.size() < 330) {
        const std::string token = parts[random() % parts.size()] + parts[random() % parts.size()];
        if (token.size() > 9) continue;
        bool known = false;
        for (const std::string& other : model.tokens) known = known || other == token;
        if (known) continue;
        parts.push_back(token);
        model.tokens.push_back(token);
    }
    std::shuffle(model.tokens.begin() + 256, model.tokens.end(), random);
    model.merges_by_rank = true;
    model.pretokenizer.pattern = PretokenPattern::gpt2;
    return model;
}

uint32_t id_of(const ByteLevelModel& model, const std::string& token) {
    for (uint32_t id = 0; id < model.tokens.size(); ++id)
        if (model.tokens[id] == token) return id;
    return ~0u;
}

// tiktoken's definition: of all neighbours that together are a token, join those of lowest id.
std::vector<uint32_t> by_definition(const ByteLevelModel& model, const std::string& piece) {
    if (model.ignore_merges && id_of(model, piece) != ~0u) return {id_of(model, piece)};
    std::vector<std::string> parts;
    for (const char c : piece) parts.push_back(std::string(1, c));
    while (true) {
        uint32_t best = ~0u;
        size_t at = 0;
        for (size_t i = 0; i + 1 < parts.size(); ++i) {
            const uint32_t id = id_of(model, parts[i] + parts[i + 1]);
            if (id < best) {
                best = id;
                at = i;
            }
        }
        if (best == ~0u) break;
        parts[at] += parts[at + 1];
        parts.erase(parts.begin() + std::ptrdiff_t(at) + 1);
    }
    std::vector<uint32_t> ids;
    for (const std::string& part : parts) ids.push_back(id_of(model, part));
    return ids;
}

std::vector<uint32_t> encode(const Encoder& encoder, std::string_view text) {
    IdBuffer ids;
    std::vector<size_t> ends;
    encoder.thread()->encode({text}, ids, ends);
    return {ids.data(), ids.data() + ids.size()};
}

}  // namespace

// Pieces are cut where no token joins two bytes, but not with ignore_merges, where a part of a
// piece may look like a token that only whole pieces become.
TEST(equals_the_definition) {
    std::mt19937 random(1);
    const std::vector<std::string> letters = {"a", "b", "é", "严", "あ", "中"};
    for (int round = 0; round < 60; ++round) {
        ByteLevelModel model = random_model(random);
        model.ignore_merges = round % 2 == 0;
        const ByteLevelBpe encoder(model);
        for (const size_t length : {1, 2, 5, 9, 30, 300}) {
            std::string piece;
            for (size_t i = 0; i < length; ++i) piece += letters[random() % letters.size()];
            CHECK_EQ(encode(encoder, piece), by_definition(model, piece));
        }
    }
}

// Merging does not give "éé": its middle bytes join first. With ignore_merges it is a token all the
// same, but only as a whole piece, not as a part of one that could be cut around it.
TEST(a_part_of_a_piece_is_no_piece) {
    std::mt19937 random(5);
    ByteLevelModel model = random_model(random);
    model.tokens.resize(256);
    model.tokens.insert(model.tokens.end(), {"\xA9\xC3", "éé"});
    for (const bool ignore_merges : {false, true}) {
        model.ignore_merges = ignore_merges;
        const ByteLevelBpe encoder(model);
        for (const char* piece : {"éé", "中éé中", "中中éé"})
            CHECK_EQ(encode(encoder, piece), by_definition(model, piece));
    }
}

TEST(many_chunks_of_one_piece) {
    std::mt19937 random(2);
    const ByteLevelModel model = random_model(random);
    const ByteLevelBpe encoder(model);
    std::string piece;
    std::vector<uint32_t> expected;
    for (int i = 0; i < 5000; ++i) {
        piece += "ж";
        expected.insert(expected.end(), {0xD0, 0xB6});
    }
    CHECK_EQ(encode(encoder, piece), expected);
}

// The text after a special token is no part of the word before it.
TEST(special_tokens_end_words) {
    std::mt19937 random(3);
    ByteLevelModel model = random_model(random);
    model.special = {{"b", 400}};
    const ByteLevelBpe encoder(model);
    CHECK_EQ(encode(encoder, "xbx xbbx"),
             (std::vector<uint32_t>{'x', 400, 'x', ' ', 'x', 400, 400, 'x'}));
}

TEST(refuses_models_that_it_cannot_take) {
    std::mt19937 random(4);
    ByteLevelModel model = random_model(random);
    model.tokens[7].clear();
    CHECK_THROWS(ByteLevelBpe(model), "a byte has no token");
    model = random_model(random);
    model.merges_by_rank = false;
    model.merges = {{1, 2}};
    CHECK_THROWS(ByteLevelBpe(model), "merge 0 makes what is no token");
}

TEST_MAIN()
