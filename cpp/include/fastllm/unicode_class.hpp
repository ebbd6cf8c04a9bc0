// The character classes that pre-tokenizers split by.
#pragma once

#include <cstdint>

namespace fastllm {

enum UnicodeClass : uint8_t {
    kLetter = 1,   // \p{L}
    kNumber = 2,   // \p{N}
    kSpace = 4,    // \s
    kNewline = 8,  // \r or \n
    kUpper = 16,   // [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]
    kLower = 32,   // [\p{Ll}\p{Lm}\p{Lo}\p{M}]
};

// All classes of all code points: page_of[cp / 256] * 256 + cp % 256 indexes `classes`. page_of[0]
// is 0.
struct UnicodeTable {
    uint8_t page_of[0x110000 / 256];
    uint8_t classes[256 * 256];
};
const UnicodeTable& unicode_table();

inline uint8_t unicode_class(const UnicodeTable& table, uint32_t cp) {
    return table.classes[uint32_t(table.page_of[cp >> 8]) << 8 | (cp & 255)];
}

}  // namespace fastllm
