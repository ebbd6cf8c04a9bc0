// UTF-8 by the table of well-formed byte sequences in the Unicode Standard (table 3-7).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace fastllm::utf8 {

// Length of the sequence that a lead byte of *valid* UTF-8 starts.
inline int length(uint8_t lead) { return lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4; }

// Code point at p, which must start a valid sequence of `n` = length(*p) bytes.
inline uint32_t decode(const uint8_t* p, int n) {
    switch (n) {
        case 1:
            return p[0];
        case 2:
            return uint32_t(p[0] & 31) << 6 | (p[1] & 63);
        case 3:
            return uint32_t(p[0] & 15) << 12 | uint32_t(p[1] & 63) << 6 | (p[2] & 63);
        default:
            return uint32_t(p[0] & 7) << 18 | uint32_t(p[1] & 63) << 12 | uint32_t(p[2] & 63) << 6 |
                   (p[3] & 63);
    }
}

// Writes the code point at `out` (room for 4 bytes) and returns the number of bytes.
inline int encode(uint32_t cp, char* out) {
    if (cp < 0x80) {
        out[0] = char(cp);
        return 1;
    }
    if (cp < 0x800) {
        out[0] = char(0xC0 | cp >> 6);
        out[1] = char(0x80 | (cp & 63));
        return 2;
    }
    if (cp < 0x10000) {
        out[0] = char(0xE0 | cp >> 12);
        out[1] = char(0x80 | ((cp >> 6) & 63));
        out[2] = char(0x80 | (cp & 63));
        return 3;
    }
    out[0] = char(0xF0 | cp >> 18);
    out[1] = char(0x80 | ((cp >> 12) & 63));
    out[2] = char(0x80 | ((cp >> 6) & 63));
    out[3] = char(0x80 | (cp & 63));
    return 4;
}

// Length of the well-formed sequence at p, or 0 if there is none (truncated, overlong, surrogate,
// above U+10FFFF, stray continuation byte).
inline int valid_length(const uint8_t* p, const uint8_t* end) {
    const uint8_t a = p[0];
    if (a < 0x80) return 1;
    const ptrdiff_t left = end - p;
    const auto tail = [&](int i) { return (p[i] & 0xC0) == 0x80; };
    if (a < 0xC2) return 0;
    if (a < 0xE0) return left >= 2 && tail(1) ? 2 : 0;
    if (a < 0xF0) {
        if (left < 3 || !tail(1) || !tail(2)) return 0;
        if (a == 0xE0 && p[1] < 0xA0) return 0;
        if (a == 0xED && p[1] > 0x9F) return 0;
        return 3;
    }
    if (a > 0xF4 || left < 4 || !tail(1) || !tail(2) || !tail(3)) return 0;
    if (a == 0xF0 && p[1] < 0x90) return 0;
    if (a == 0xF4 && p[1] > 0x8F) return 0;
    return 4;
}

// First byte that is not part of well-formed UTF-8, or `end`.
inline const uint8_t* find_invalid(const uint8_t* p, const uint8_t* end) {
    while (p < end) {
        uint64_t word;
        while (end - p >= 8) {
            std::memcpy(&word, p, 8);
            if (word & 0x8080808080808080ull) break;
            p += 8;
        }
        if (p == end) break;
        const int n = valid_length(p, end);
        if (n == 0) return p;
        p += n;
    }
    return end;
}

}  // namespace fastllm::utf8
