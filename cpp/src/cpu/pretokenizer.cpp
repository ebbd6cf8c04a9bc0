#include "fastllm/pretokenizer.hpp"

#include <algorithm>

#include "fastllm/utf8.hpp"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fastllm {
namespace {

struct Character {
    uint8_t classes;
    int length;
};

inline Character at(const UnicodeTable& table, const uint8_t* p) {
    if (*p < 0x80) return {table.classes[*p], 1};  // page 0 is the first in the table
    const int length = utf8::length(*p);
    return {unicode_class(table, utf8::decode(p, length)), length};
}

// The longest run of characters that have any of `wanted`.
inline const uint8_t* run(const UnicodeTable& table, const uint8_t* p, const uint8_t* end,
                          uint8_t wanted) {
    while (p < end) {
        const Character c = at(table, p);
        if (!(c.classes & wanted)) break;
        p += c.length;
    }
    return p;
}

// The longest run of characters that have none of `unwanted`.
inline const uint8_t* run_without(const UnicodeTable& table, const uint8_t* p, const uint8_t* end,
                                  uint8_t unwanted) {
    while (p < end) {
        const Character c = at(table, p);
        if (c.classes & unwanted) break;
        p += c.length;
    }
    return p;
}

// `'s|'t|'re|'ve|'m|'ll|'d` at p: its length, or 0. U+017F, the long s, is an s to (?i:…).
int contraction(const uint8_t* p, const uint8_t* end, bool ignore_case) {
    if (end - p < 2 || p[0] != '\'') return 0;
    const uint8_t fold = ignore_case ? 0x20 : 0;
    const auto letter = [&](int i) { return uint8_t(p[i] | (p[i] < 0x80 ? fold : 0)); };
    switch (letter(1)) {
        case 's':
        case 't':
        case 'm':
        case 'd':
            return 2;
        default:
            break;
    }
    if (ignore_case && end - p >= 3 && p[1] == 0xC5 && p[2] == 0xBF) return 3;
    if (end - p < 3) return 0;
    const uint8_t a = letter(1), b = letter(2);
    return (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l') ? 3 : 0;
}

// `\s+(?!\S)|\s+` at p, where white space starts: all of it at the end of the text or if it is one
// character, else all but its last character, which the next piece may take.
const uint8_t* white_space(const UnicodeTable& table, const uint8_t* p, const uint8_t* end) {
    const uint8_t* last = p;
    const uint8_t* q = p;
    while (q < end) {
        const Character c = at(table, q);
        if (!(c.classes & kSpace)) break;
        last = q;
        q += c.length;
    }
    return q == end || last == p ? q : last;
}

// End of the last newline in the white space at p, or null: `\s*[\r\n]+`.
const uint8_t* through_newline(const UnicodeTable& table, const uint8_t* p, const uint8_t* end) {
    const uint8_t* found = nullptr;
    while (p < end) {
        const Character c = at(table, p);
        if (!(c.classes & kSpace)) break;
        p += c.length;
        if (c.classes & kNewline) found = p;
    }
    return found;
}

// Which of the 16 bytes at p are ASCII letters from `first` to `first` + 25, one bit each; `fold`
// is what is set in each byte before.
unsigned letters_from(const uint8_t* p, char first, char fold) {
#if defined(__SSE2__)
    __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    x = _mm_or_si128(x, _mm_set1_epi8(fold));
    // Moved so that the last letter becomes the greatest signed byte; what is above wraps around.
    x = _mm_add_epi8(x, _mm_set1_epi8(char(0x7F - (first + 25))));
    return unsigned(_mm_movemask_epi8(_mm_cmpgt_epi8(x, _mm_set1_epi8(0x7F - 26))));
#else
    unsigned mask = 0;
    for (unsigned i = 0; i < 16; ++i) mask |= unsigned(uint8_t((p[i] | fold) - first) < 26) << i;
    return mask;
#endif
}

unsigned trailing_ones(unsigned mask) { return unsigned(__builtin_ctz(~mask)); }

// End of the 1 to 15 ASCII letters at p that an ASCII byte ends, or null: most words, found without
// a branch on their length.
const uint8_t* short_word(const uint8_t* p, const uint8_t* end) {
    const unsigned n = trailing_ones(letters_from(p, 'a', 0x20));
    if (n == 0 || n > 15 || p[n] >= 0x80) return nullptr;
    return std::min(p + n, end);
}

// The same for U*L+, where no contraction may follow.
const uint8_t* short_cased_word(const uint8_t* p, const uint8_t* end) {
    const unsigned upper = trailing_ones(letters_from(p, 'A', 0));
    const unsigned lower = trailing_ones(letters_from(p, 'a', 0) >> upper);
    const unsigned n = upper + lower;
    if (lower == 0 || n > 15 || p[n] >= 0x80 || p[n] == '\'') return nullptr;
    return std::min(p + n, end);
}

// ASCII that [^\r\n\p{L}\p{N}]? takes, but for the apostrophe, which may start a contraction.
constexpr bool before_word(uint8_t c) {
    const bool letter = uint8_t((c | 0x20) - 'a') < 26, digit = uint8_t(c - '0') < 10;
    return c < 0x80 && !letter && !digit && c != '\r' && c != '\n' && c != '\'';
}

struct BeforeWord {
    bool is[256];
    constexpr BeforeWord() : is() {
        for (int c = 0; c < 256; ++c) is[c] = before_word(uint8_t(c));
    }
};
constexpr BeforeWord kBeforeWord;

std::string without_case_flag(std::string expression) {
    // Ways in which the same contractions are written.
    for (const char* form :
         {"(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)", "(?i:[sdmt]|ll|ve|re)"}) {
        const std::string text = form;
        for (size_t found; (found = expression.find(text)) != std::string::npos;)
            expression.replace(found, text.size(), "{C}");
    }
    return expression;
}

}  // namespace

const uint8_t* Pretokenizer::next(const uint8_t* p, const uint8_t* end) const {
    switch (pattern) {
        case PretokenPattern::gpt2:
            return next_gpt2(p, end);
        case PretokenPattern::cl100k:
            return next_cl100k(p, end);
        default:
            return next_o200k(p, end);
    }
}

const uint8_t* Pretokenizer::numbers(const uint8_t* p, const uint8_t* end) const {
    for (int i = 0; i < digits && p < end; ++i) {
        const Character c = at(*table_, p);
        if (!(c.classes & kNumber)) break;
        p += c.length;
    }
    return p;
}

const uint8_t* Pretokenizer::next_gpt2(const uint8_t* p, const uint8_t* end) const {
    if (const uint8_t* const word = short_word(p + (*p == ' '), end)) return word;
    if (const int n = contraction(p, end, false)) return p + n;
    const UnicodeTable& table = *table_;
    const uint8_t* q = *p == ' ' && p + 1 < end ? p + 1 : p;
    const Character c = at(table, q);
    if (c.classes & kSpace) return white_space(table, p, end);
    if (c.classes & kLetter) return run(table, q + c.length, end, kLetter);
    if (c.classes & kNumber) return run(table, q + c.length, end, kNumber);
    return run_without(table, q + c.length, end, kSpace | kLetter | kNumber);
}

const uint8_t* Pretokenizer::next_cl100k(const uint8_t* p, const uint8_t* end) const {
    if (const uint8_t* const word = short_word(p + kBeforeWord.is[*p], end)) return word;
    if (contractions)
        if (const int n = contraction(p, end, true)) return p + n;
    const UnicodeTable& table = *table_;
    const Character c = at(table, p);
    if (c.classes & kLetter) return run(table, p + c.length, end, kLetter);
    if (c.classes & kNumber) return numbers(p, end);
    const uint8_t* const q = p + c.length;
    const Character second = q < end ? at(table, q) : Character{kSpace, 0};
    // [^\r\n\p{L}\p{N}]?\p{L}+
    if (!(c.classes & kNewline) && (second.classes & kLetter))
        return run(table, q + second.length, end, kLetter);
    // ?[^\s\p{L}\p{N}]+[\r\n]*
    constexpr uint8_t kWord = kSpace | kLetter | kNumber;
    if (!(c.classes & kSpace) || (*p == ' ' && !(second.classes & kWord)))
        return run(table, run_without(table, q, end, kWord), end, kNewline);
    if (const uint8_t* const newline = through_newline(table, p, end)) return newline;
    return white_space(table, p, end);
}

const uint8_t* Pretokenizer::next_o200k(const uint8_t* p, const uint8_t* end) const {
    if (const uint8_t* const word = short_cased_word(p + kBeforeWord.is[*p], end)) return word;
    const UnicodeTable& table = *table_;
    const Character c = at(table, p);
    const auto with_contraction = [&](const uint8_t* stop) {
        return contractions ? stop + contraction(stop, end, true) : stop;
    };
    // U*L+: U* takes all it can; if no L follows, it gives back up to the last character that is
    // both.
    const auto first_form = [&](const uint8_t* start) -> const uint8_t* {
        const uint8_t* const upper = run(table, start, end, kUpper);
        const uint8_t* stop = run(table, upper, end, kLower);
        if (stop > upper) return with_contraction(stop);
        stop = nullptr;
        for (const uint8_t* q = start; q < upper;) {
            const Character x = at(table, q);
            q += x.length;
            if (x.classes & kLower) stop = q;
        }
        return stop ? with_contraction(stop) : nullptr;
    };
    // U+L*, where the first form has failed: so no L follows.
    const auto second_form = [&](const uint8_t* start) -> const uint8_t* {
        const uint8_t* const upper = run(table, start, end, kUpper);
        return upper > start ? with_contraction(upper) : nullptr;
    };
    // Each form tries [^\r\n\p{L}\p{N}]? with a character, then without.
    const bool optional = !(c.classes & (kNewline | kLetter | kNumber));
    if (optional)
        if (const uint8_t* const stop = first_form(p + c.length)) return stop;
    if (const uint8_t* const stop = first_form(p)) return stop;
    if (optional)
        if (const uint8_t* const stop = second_form(p + c.length)) return stop;
    if (const uint8_t* const stop = second_form(p)) return stop;
    if (c.classes & kNumber) return numbers(p, end);
    const uint8_t* const q = p + c.length;
    constexpr uint8_t kWord = kSpace | kLetter | kNumber;
    const Character second = q < end ? at(table, q) : Character{kSpace, 0};
    if (!(c.classes & kSpace) || (*p == ' ' && !(second.classes & kWord))) {
        const uint8_t* stop = run_without(table, q, end, kWord);
        while (stop < end && (*stop == '\r' || *stop == '\n' || *stop == '/')) ++stop;
        return stop;
    }
    if (const uint8_t* const newline = through_newline(table, p, end)) return newline;
    return white_space(table, p, end);
}

std::optional<Pretokenizer> Pretokenizer::from_regex(const std::string& expression) {
    const std::string e = without_case_flag(expression);
    const auto made = [](PretokenPattern pattern, int digits, bool contractions) {
        Pretokenizer result;
        result.pattern = pattern;
        result.digits = digits;
        result.contractions = contractions;
        return result;
    };
    const std::string tail = R"(|\s*[\r\n]+|\s+(?!\S)|\s+)";
    if (e == R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)" ||
        e == R"('(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)")
        return made(PretokenPattern::gpt2, 0, true);
    for (const int digits : {1, 3}) {
        const std::string number = digits == 1 ? R"(|\p{N}|)" : R"(|\p{N}{1,3}|)";
        if (e == R"({C}|[^\r\n\p{L}\p{N}]?\p{L}+)" + number + R"( ?[^\s\p{L}\p{N}]+[\r\n]*)" + tail)
            return made(PretokenPattern::cl100k, digits, true);
        for (const bool contractions : {false, true}) {
            const std::string c = contractions ? "{C}?" : "";
            const std::string first =
                R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+)";
            const std::string second =
                R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*)";
            if (e == first + c + "|" + second + c + number + R"( ?[^\s\p{L}\p{N}]+[\r\n/]*)" + tail)
                return made(PretokenPattern::o200k, digits, contractions);
        }
    }
    return std::nullopt;
}

}  // namespace fastllm
