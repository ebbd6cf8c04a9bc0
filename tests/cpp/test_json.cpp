#include "fastllm/json.hpp"
#include "test.hpp"

using fastllm::JsonField;
using fastllm::JsonLine;

namespace {

// The texts of "text" in one line, joined by '|'; or the kind of value that it is instead.
std::string text_of(const std::string& line) {
    JsonLine json({"text"});
    // A heap block of exactly this size, so that AddressSanitizer sees any read past the end.
    const std::vector<char> exact(line.begin(), line.end());
    json.parse(exact.data(), exact.data() + exact.size());
    const JsonField& field = json.fields()[0];
    if (field.kind == JsonField::Kind::missing) return "(missing)";
    if (field.kind == JsonField::Kind::other) return std::string("(") + field.type + ")";
    std::string joined;
    for (size_t i = 0; i < field.texts.size(); ++i)
        joined += (i ? "|" : "") + std::string(field.texts[i]);
    return joined;
}

}  // namespace

TEST(reads_plain_text) {
    CHECK_EQ(text_of(R"({"text": "hello"})"), "hello");
    CHECK_EQ(text_of("  { \"a\" : [1, {\"text\": 2}] , \"text\":\"\" }\r"), "");
    CHECK_EQ(text_of(R"({"text": "0123456789abcdef0123456789abcdef0123\n4"})"),
             "0123456789abcdef0123456789abcdef0123\n4");
}

TEST(decodes_escapes) {
    CHECK_EQ(text_of(R"({"text": "\"\\\/\b\f\n\r\tA\u00e9\u4e16\ud83d\ude00"})"),
             "\"\\/\b\f\n\r\tA\xC3\xA9\xE4\xB8\x96\xF0\x9F\x98\x80");
    CHECK_EQ(text_of(R"({"\u0074ext": "key with an escape"})"), "key with an escape");
    CHECK_EQ(text_of(R"({"text": "a\u0000b"})"), std::string("a\0b", 3));
}

TEST(the_last_of_repeated_keys_wins) {
    CHECK_EQ(text_of(R"({"text": "one", "text": "t\u0077o"})"), "two");
    CHECK_EQ(text_of(R"({"text": ["a", "b"], "text": 1})"), "(a number)");
}

TEST(reads_lists_and_names_other_types) {
    CHECK_EQ(text_of(R"({"text": ["a", "", "c\n"]})"), "a||c\n");
    CHECK_EQ(text_of(R"({"text": []})"), "");
    CHECK_EQ(text_of(R"({"text": null})"), "(null)");
    CHECK_EQ(text_of(R"({"text": {"a": []}})"), "(an object)");
    CHECK_EQ(text_of(R"({"text": ["a", 1]})"), "(a list that holds more than strings)");
    CHECK_EQ(text_of(R"({"other": 123456789012345678901234567890, "x": -1.5e-3, "y": NaN})"),
             "(missing)");
}

TEST(refuses_what_is_not_json) {
    CHECK_THROWS(text_of(""), "expected an object");
    CHECK_THROWS(text_of("[]"), "expected an object");
    CHECK_THROWS(text_of(R"({"text": "cut)"), "not closed");
    CHECK_THROWS(text_of(R"({"text": "cut\)"), "not closed");
    CHECK_THROWS(text_of(R"({"text": "x"} x)"), "end of the line");
    CHECK_THROWS(text_of(R"({"text": "x",})"), "key in double quotes");
    CHECK_THROWS(text_of(R"({"text" "x"})"), "':'");
    CHECK_THROWS(text_of(R"({"text": "\q"})"), "unknown escape");
    CHECK_THROWS(text_of(R"({"text": "\u12g4"})"), "hexadecimal");
    CHECK_THROWS(text_of("{\"text\": \"a\tb\"}"), "control character");
    CHECK_THROWS(text_of(R"({"a": 01, "text": "x"})"), "',' or '}'");
    CHECK_THROWS(text_of(R"({"a": tru, "text": "x"})"), "a value");
    CHECK_THROWS(text_of(R"({"a": 1., "text": "x"})"), "digit");
    CHECK_THROWS(text_of("{\"text\": \"\xC3\"}"), "not UTF-8");
    CHECK_THROWS(text_of("{\"text\": \"\xED\xA0\x80\"}"), "not UTF-8");
    CHECK_THROWS(text_of("{\"text\": \"\xF5\x80\x80\x80\"}"), "not UTF-8");
    CHECK_THROWS(text_of("{\"text\": \"\xC0\xAF\"}"), "not UTF-8");
}

TEST(refuses_deep_nesting_without_overflowing_the_stack) {
    const std::string deep(100000, '[');
    CHECK_THROWS(text_of("{\"a\": " + deep), "nested more than");
}

TEST(reports_half_a_surrogate_pair) {
    JsonLine json({"text", "other"});
    const std::string line = R"({"text": "\ud83d", "other": "\ud83d\u0041"})";
    json.parse(line.data(), line.data() + line.size());
    CHECK(json.fields()[0].lone_surrogate);
    CHECK(json.fields()[1].lone_surrogate);
}

TEST(says_at_which_byte) {
    JsonLine json({"text"});
    const std::string line = R"({"text": nope})";
    size_t offset = 0;
    try {
        json.parse(line.data(), line.data() + line.size());
    } catch (const fastllm::JsonError& error) {
        offset = error.offset;
    }
    CHECK_EQ(offset, size_t(9));
}

TEST_MAIN()
