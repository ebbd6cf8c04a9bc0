// A strict JSON parser for one job: the text fields of one line of a JSONL file.
//
// It accepts what Python's json.loads accepts (RFC 8259 plus NaN, Infinity and -Infinity; integers
// of any size; a repeated key's last value wins) and validates the whole line, UTF-8 included, so
// that a broken line is never taken for a good one. tests/data/test_json_lines.py compares it with
// json.loads.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace fastllm {

// What is wrong with a line, and at which byte of it (from 0).
class JsonError : public std::runtime_error {
  public:
    JsonError(const std::string& message, size_t at) : std::runtime_error(message), offset(at) {}
    size_t offset;
};

// The value of one wanted key.
struct JsonField {
    enum class Kind { missing, text, list, other };
    Kind kind = Kind::missing;
    std::vector<std::string_view> texts;  // one for `text`, any number for `list`
    const char* type = "";        // for `other`: null, boolean, number, object, or a bad list
    bool lone_surrogate = false;  // a \ud800–\udfff without its partner: no UTF-8 exists for it
};

class JsonLine {
  public:
    // `keys`: the top-level keys whose values are wanted.
    explicit JsonLine(std::vector<std::string> keys);

    // Parses one line that holds one JSON object. The views in fields() point into [begin, end) or
    // into this object, and hold until the next parse. Throws JsonError.
    void parse(const char* begin, const char* end);

    const std::vector<JsonField>& fields() const { return fields_; }

  private:
    struct String {
        std::string_view text;
        bool lone_surrogate;
    };

    [[noreturn]] void fail(const std::string& message) const;
    [[noreturn]] void fail_expected(const char* what) const;
    void skip_space();
    String parse_string();
    void parse_escape(bool& lone_surrogate);
    unsigned parse_hex4();
    void parse_object();
    void parse_wanted(JsonField& field);
    void parse_text_list(JsonField& field);
    const char* skip_value(int depth);
    void skip_members(int depth);
    void skip_elements(int depth);
    void skip_number();
    void expect_word(std::string_view word);

    std::vector<std::string> keys_;
    std::vector<JsonField> fields_;
    std::vector<char> decoded_;  // strings with escapes; never longer than the line, so never moved
    char* write_ = nullptr;
    const char* begin_ = nullptr;
    const char* p_ = nullptr;
    const char* end_ = nullptr;
};

}  // namespace fastllm
