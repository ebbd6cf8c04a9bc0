#include "fastllm/unicode_class.hpp"

#include <array>
#include <cstddef>
#include <map>
#include <memory>
#include <stdexcept>

namespace fastllm {
namespace {

struct Range {
    uint32_t first, last;
    uint8_t classes;
};

constexpr Range kRanges[] = {
#include "unicode_ranges.inc"
};

std::unique_ptr<UnicodeTable> make_table() {
    std::unique_ptr<uint8_t[]> all(new uint8_t[0x110000]());
    for (const Range& range : kRanges)
        for (uint32_t cp = range.first; cp <= range.last; ++cp) all[cp] = range.classes;
    all['\r'] |= kNewline;
    all['\n'] |= kNewline;
    auto table = std::make_unique<UnicodeTable>();
    std::map<std::array<uint8_t, 256>, uint8_t> pages;  // most pages are alike
    for (size_t page = 0; page < 0x110000 / 256; ++page) {
        std::array<uint8_t, 256> content;
        for (size_t i = 0; i < 256; ++i) content[i] = all[page * 256 + i];
        const auto [found, added] = pages.emplace(content, uint8_t(pages.size()));
        if (pages.size() > 255) throw std::logic_error("the Unicode table has too many pages");
        if (added)
            for (size_t i = 0; i < 256; ++i)
                table->classes[size_t(found->second) * 256 + i] = content[i];
        table->page_of[page] = found->second;
    }
    return table;
}

}  // namespace

const UnicodeTable& unicode_table() {
    static const std::unique_ptr<UnicodeTable> table = make_table();
    return *table;
}

}  // namespace fastllm
