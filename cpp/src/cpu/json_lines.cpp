#include "fastllm/json_lines.hpp"

#include <cstring>
#include <string_view>
#include <utility>

#include "fastllm/error.hpp"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fastllm {
namespace {

bool needs_escape(char c) { return c == '"' || c == '\\' || uint8_t(c) < 0x20; }

const char* find_escape(const char* p, const char* end) {
#if defined(__SSE2__)
    const __m128i quote = _mm_set1_epi8('"');
    const __m128i backslash = _mm_set1_epi8('\\');
    const __m128i last_control = _mm_set1_epi8(0x1F);
    while (end - p >= 16) {
        const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        const __m128i control = _mm_cmpeq_epi8(_mm_min_epu8(x, last_control), x);
        const __m128i hit = _mm_or_si128(
            _mm_or_si128(_mm_cmpeq_epi8(x, quote), _mm_cmpeq_epi8(x, backslash)), control);
        const int mask = _mm_movemask_epi8(hit);
        if (mask) return p + __builtin_ctz(unsigned(mask));
        p += 16;
    }
#endif
    while (p < end && !needs_escape(*p)) ++p;
    return p;
}

struct Counter {
    size_t size = 0;
    void add(const char*, size_t count) { size += count; }
};

struct Writer {
    char* to;
    void add(const char* from, size_t count) {
        std::memcpy(to, from, count);
        to += count;
    }
};

template <class Out>
void put_escape(Out& out, char c) {
    constexpr std::string_view kShort = "\"\\\b\f\n\r\t";
    constexpr std::string_view kLetters = "\"\\bfnrt";
    const size_t at = kShort.find(c);
    if (at != std::string_view::npos) {
        const char both[] = {'\\', kLetters[at]};
        out.add(both, 2);
        return;
    }
    constexpr const char* kHex = "0123456789abcdef";
    const char code[] = {'\\', 'u', '0', '0', kHex[uint8_t(c) >> 4], kHex[c & 15]};
    out.add(code, 6);
}

template <class Out>
void put_string(Out& out, std::string_view text) {
    out.add("\"", 1);
    const char* p = text.data();
    const char* const end = p + text.size();
    while (true) {
        const char* const stop = find_escape(p, end);
        if (stop > p) out.add(p, size_t(stop - p));
        if (stop == end) break;
        put_escape(out, *stop);
        p = stop + 1;
    }
    out.add("\"", 1);
}

std::string quoted(std::string_view text) {
    Counter counter;
    put_string(counter, text);
    std::string result(counter.size, '\0');
    Writer writer{result.data()};
    put_string(writer, text);
    return result;
}

uint64_t offset_at(const StringColumn& column, size_t row) {
    const size_t width = column.wide ? 8 : 4;
    int64_t wide = 0;
    int32_t narrow = 0;
    const auto* const from = static_cast<const char*>(column.offsets) + row * width;
    if (column.wide)
        std::memcpy(&wide, from, width);
    else
        std::memcpy(&narrow, from, width);
    return uint64_t(column.wide ? wide : narrow);
}

void check_sizes(const StringColumn& column, size_t rows) {
    if (rows == 0) return;
    const size_t last = column.first + rows;
    if (last < rows || column.offsets_bytes / (column.wide ? 8 : 4) <= last)
        throw InputError("a column of strings has fewer offsets than rows");
    if (column.validity && column.validity_bytes < (last + 7) / 8)
        throw InputError("a column of strings has a short validity bitmap");
}

bool is_null(const StringColumn& column, size_t row) {
    return column.validity && !(column.validity[row / 8] >> (row % 8) & 1);
}

std::string_view text_at(const StringColumn& column, size_t row) {
    const uint64_t begin = offset_at(column, row), end = offset_at(column, row + 1);
    if (begin > end || end > column.data_bytes)
        throw InputError("a column of strings has offsets out of its data");
    return {column.data + begin, size_t(end - begin)};
}

}  // namespace

template <class Out>
void JsonLines::put(Out& out) const {
    for (size_t i = 0; i < rows_; ++i) {
        for (size_t k = 0; k < columns_.size(); ++k) {
            const size_t row = columns_[k].first + i;
            out.add(before_[k].data(), before_[k].size());
            if (is_null(columns_[k], row))
                out.add("null", 4);
            else
                put_string(out, text_at(columns_[k], row));
        }
        const std::string_view end = columns_.empty() ? "{}\n" : "}\n";
        out.add(end.data(), end.size());
    }
}

JsonLines::JsonLines(const std::vector<std::string>& keys, std::vector<StringColumn> columns,
                     size_t rows)
    : columns_(std::move(columns)), rows_(rows) {
    if (keys.size() != columns_.size()) throw InputError("a key is needed for each column");
    for (size_t k = 0; k < keys.size(); ++k) {
        before_.push_back((k == 0 ? "{" : ", ") + quoted(keys[k]) + ": ");
        check_sizes(columns_[k], rows);
    }
    Counter counter;
    put(counter);
    size_ = counter.size;
}

void JsonLines::write(char* out) const {
    Writer writer{out};
    put(writer);
}

}  // namespace fastllm
