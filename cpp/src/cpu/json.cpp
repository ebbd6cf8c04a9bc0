#include "fastllm/json.hpp"

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <utility>

#include "fastllm/utf8.hpp"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fastllm {
namespace {

// Nesting that json.loads refuses too (its limit is the interpreter's recursion limit, 1000).
constexpr int kMaxDepth = 990;

// First byte of a string that needs a look: a quote, a backslash, a control character or non-ASCII.
inline const char* find_special(const char* p, const char* end) {
#if defined(__SSE2__)
    const __m128i quote = _mm_set1_epi8('"');
    const __m128i backslash = _mm_set1_epi8('\\');
    const __m128i space = _mm_set1_epi8(' ');
    while (end - p >= 16) {
        const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        // As signed bytes, control characters and non-ASCII are both less than a space.
        const __m128i hit =
            _mm_or_si128(_mm_or_si128(_mm_cmpeq_epi8(x, quote), _mm_cmpeq_epi8(x, backslash)),
                         _mm_cmplt_epi8(x, space));
        const int mask = _mm_movemask_epi8(hit);
        if (mask) return p + __builtin_ctz(unsigned(mask));
        p += 16;
    }
#endif
    for (; p < end; ++p) {
        const auto c = uint8_t(*p);
        if (c == '"' || c == '\\' || c < 0x20 || c >= 0x80) return p;
    }
    return end;
}

bool is_digit(char c) { return c >= '0' && c <= '9'; }

std::string show_byte(char c) {
    char text[16];
    const auto u = uint8_t(c);
    if (u >= 0x20 && u < 0x7F)
        std::snprintf(text, sizeof text, "'%c'", c);
    else
        std::snprintf(text, sizeof text, "byte 0x%02x", u);
    return text;
}

}  // namespace

JsonLine::JsonLine(std::vector<std::string> keys) : keys_(std::move(keys)), fields_(keys_.size()) {}

void JsonLine::fail(const std::string& message) const {
    throw JsonError(message, size_t(p_ - begin_));
}

void JsonLine::fail_expected(const char* what) const {
    const std::string found = p_ < end_ ? show_byte(*p_) : std::string("the end of the line");
    fail(std::string("not JSON: expected ") + what + ", found " + found);
}

void JsonLine::skip_space() {
    while (p_ < end_ && (*p_ == ' ' || *p_ == '\t' || *p_ == '\n' || *p_ == '\r')) ++p_;
}

void JsonLine::parse(const char* begin, const char* end) {
    begin_ = p_ = begin;
    end_ = end;
    const auto size = size_t(end - begin);
    if (decoded_.size() < size) {
        decoded_.clear();  // and free it first: lines may be huge
        decoded_.shrink_to_fit();
        decoded_.resize(size + size / 4);
    }
    write_ = decoded_.data();
    for (JsonField& field : fields_) {
        field.kind = JsonField::Kind::missing;
        field.texts.clear();
        field.lone_surrogate = false;
    }
    skip_space();
    if (p_ == end_ || *p_ != '{') fail_expected("an object, '{'");
    ++p_;
    parse_object();
    skip_space();
    if (p_ != end_) fail_expected("the end of the line after the object");
}

void JsonLine::parse_object() {
    skip_space();
    if (p_ < end_ && *p_ == '}') {
        ++p_;
        return;
    }
    while (true) {
        skip_space();
        if (p_ == end_ || *p_ != '"') fail_expected("a key in double quotes");
        const std::string_view key = parse_string().text;
        skip_space();
        if (p_ == end_ || *p_ != ':') fail_expected("':' after the key");
        ++p_;
        skip_space();
        size_t wanted = 0;
        while (wanted < keys_.size() && keys_[wanted] != key) ++wanted;
        if (wanted < keys_.size())
            parse_wanted(fields_[wanted]);
        else
            skip_value(1);
        skip_space();
        if (p_ < end_ && *p_ == ',') {
            ++p_;
            continue;
        }
        if (p_ < end_ && *p_ == '}') {
            ++p_;
            return;
        }
        fail_expected("',' or '}'");
    }
}

void JsonLine::parse_wanted(JsonField& field) {
    field.texts.clear();
    field.lone_surrogate = false;
    if (p_ < end_ && *p_ == '"') {
        const String value = parse_string();
        field.kind = JsonField::Kind::text;
        field.texts.push_back(value.text);
        field.lone_surrogate = value.lone_surrogate;
    } else if (p_ < end_ && *p_ == '[') {
        parse_text_list(field);
    } else {
        field.kind = JsonField::Kind::other;
        field.type = skip_value(1);
    }
}

void JsonLine::parse_text_list(JsonField& field) {
    field.kind = JsonField::Kind::list;
    ++p_;
    skip_space();
    if (p_ < end_ && *p_ == ']') {
        ++p_;
        return;
    }
    while (true) {
        skip_space();
        if (p_ < end_ && *p_ == '"') {
            const String value = parse_string();
            field.texts.push_back(value.text);
            field.lone_surrogate |= value.lone_surrogate;
        } else {
            skip_value(2);
            field.kind = JsonField::Kind::other;
            field.type = "a list that holds more than strings";
        }
        skip_space();
        if (p_ < end_ && *p_ == ',') {
            ++p_;
            continue;
        }
        if (p_ < end_ && *p_ == ']') {
            ++p_;
            return;
        }
        fail_expected("',' or ']'");
    }
}

JsonLine::String JsonLine::parse_string() {
    ++p_;  // the opening quote
    const char* const start = p_;
    char* const out = write_;
    const char* copied =
        nullptr;  // what is before it has been copied to `out`; null: no escape so far
    bool lone_surrogate = false;
    while (true) {
        p_ = find_special(p_, end_);
        if (p_ == end_) fail("not JSON: a string is not closed");
        const auto c = uint8_t(*p_);
        if (c >= 0x80) {
            const auto* const u = reinterpret_cast<const uint8_t*>(p_);
            const int n = utf8::valid_length(u, reinterpret_cast<const uint8_t*>(end_));
            if (n == 0) fail("not UTF-8: " + show_byte(*p_));
            p_ += n;
        } else if (c == '"' || c == '\\') {
            if (copied || c == '\\') {
                const char* const from = copied ? copied : start;
                std::memcpy(write_, from, size_t(p_ - from));
                write_ += p_ - from;
            }
            ++p_;
            if (c == '"') {
                if (!copied) return {{start, size_t(p_ - 1 - start)}, false};
                return {{out, size_t(write_ - out)}, lone_surrogate};
            }
            parse_escape(lone_surrogate);
            copied = p_;
        } else {
            fail("not JSON: a control character (" + show_byte(*p_) + ") inside a string");
        }
    }
}

void JsonLine::parse_escape(bool& lone_surrogate) {
    if (p_ == end_) fail("not JSON: a string is not closed");
    const char c = *p_++;
    switch (c) {
        case '"':
        case '\\':
        case '/':
            *write_++ = c;
            return;
        case 'b':
            *write_++ = '\b';
            return;
        case 'f':
            *write_++ = '\f';
            return;
        case 'n':
            *write_++ = '\n';
            return;
        case 'r':
            *write_++ = '\r';
            return;
        case 't':
            *write_++ = '\t';
            return;
        case 'u':
            break;
        default:
            --p_;
            fail("not JSON: unknown escape \\" + show_byte(c));
    }
    unsigned cp = parse_hex4();
    if (cp >= 0xD800 && cp < 0xDC00 && end_ - p_ >= 6 && p_[0] == '\\' && p_[1] == 'u') {
        const char* const before = p_;
        p_ += 2;
        const unsigned low = parse_hex4();
        if (low >= 0xDC00 && low < 0xE000)
            cp = 0x10000 + ((cp - 0xD800) << 10) + (low - 0xDC00);
        else
            p_ = before;  // not a pair: the second escape stands for itself
    }
    if (cp >= 0xD800 && cp < 0xE000) lone_surrogate = true;
    write_ += utf8::encode(cp, write_);
}

unsigned JsonLine::parse_hex4() {
    unsigned value = 0;
    for (int i = 0; i < 4; ++i, ++p_) {
        const char c = p_ < end_ ? *p_ : '\0';
        if (is_digit(c))
            value = value << 4 | unsigned(c - '0');
        else if (c >= 'a' && c <= 'f')
            value = value << 4 | unsigned(c - 'a' + 10);
        else if (c >= 'A' && c <= 'F')
            value = value << 4 | unsigned(c - 'A' + 10);
        else
            fail_expected("four hexadecimal digits after \\u");
    }
    return value;
}

// Skips one value and returns the name of its type.
const char* JsonLine::skip_value(int depth) {
    if (depth > kMaxDepth) fail("nested more than " + std::to_string(kMaxDepth) + " deep");
    if (p_ == end_) fail_expected("a value");
    switch (*p_) {
        case '"': {
            // Not wanted: its decoded bytes may be overwritten by the next string.
            char* const keep = write_;
            parse_string();
            write_ = keep;
            return "a string";
        }
        case '{':
            skip_members(depth);
            return "an object";
        case '[':
            skip_elements(depth);
            return "a list";
        case 't':
            expect_word("true");
            return "a boolean";
        case 'f':
            expect_word("false");
            return "a boolean";
        case 'n':
            expect_word("null");
            return "null";
        case 'N':
            expect_word("NaN");
            return "a number";
        case 'I':
            expect_word("Infinity");
            return "a number";
        default:
            skip_number();
            return "a number";
    }
}

void JsonLine::skip_members(int depth) {
    ++p_;
    skip_space();
    if (p_ < end_ && *p_ == '}') {
        ++p_;
        return;
    }
    while (true) {
        skip_space();
        if (p_ == end_ || *p_ != '"') fail_expected("a key in double quotes");
        skip_value(depth);
        skip_space();
        if (p_ == end_ || *p_ != ':') fail_expected("':' after the key");
        ++p_;
        skip_space();
        skip_value(depth + 1);
        skip_space();
        if (p_ < end_ && *p_ == ',') {
            ++p_;
            continue;
        }
        if (p_ < end_ && *p_ == '}') {
            ++p_;
            return;
        }
        fail_expected("',' or '}'");
    }
}

void JsonLine::skip_elements(int depth) {
    ++p_;
    skip_space();
    if (p_ < end_ && *p_ == ']') {
        ++p_;
        return;
    }
    while (true) {
        skip_space();
        skip_value(depth + 1);
        skip_space();
        if (p_ < end_ && *p_ == ',') {
            ++p_;
            continue;
        }
        if (p_ < end_ && *p_ == ']') {
            ++p_;
            return;
        }
        fail_expected("',' or ']'");
    }
}

void JsonLine::skip_number() {
    if (p_ < end_ && *p_ == '-') ++p_;
    if (p_ < end_ && *p_ == 'I') {
        expect_word("Infinity");
        return;
    }
    if (p_ == end_ || !is_digit(*p_)) fail_expected("a value");
    if (*p_ == '0')
        ++p_;
    else
        while (p_ < end_ && is_digit(*p_)) ++p_;
    if (p_ < end_ && *p_ == '.') {
        ++p_;
        if (p_ == end_ || !is_digit(*p_)) fail_expected("a digit after '.'");
        while (p_ < end_ && is_digit(*p_)) ++p_;
    }
    if (p_ < end_ && (*p_ == 'e' || *p_ == 'E')) {
        ++p_;
        if (p_ < end_ && (*p_ == '+' || *p_ == '-')) ++p_;
        if (p_ == end_ || !is_digit(*p_)) fail_expected("a digit of the exponent");
        while (p_ < end_ && is_digit(*p_)) ++p_;
    }
}

void JsonLine::expect_word(std::string_view word) {
    if (size_t(end_ - p_) < word.size() || std::memcmp(p_, word.data(), word.size()) != 0)
        fail_expected("a value");
    p_ += word.size();
}

}  // namespace fastllm
