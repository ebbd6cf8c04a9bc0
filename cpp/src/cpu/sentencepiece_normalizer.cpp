#include "fastllm/sentencepiece_normalizer.hpp"

#include <cstring>

#include "fastllm/error.hpp"
#include "fastllm/utf8.hpp"

namespace fastllm {
namespace {

constexpr std::string_view kSpaceSymbol = "\xE2\x96\x81";  // U+2581

// A unit of the double array (the Darts-clone layout that SentencePiece stores).
bool has_leaf(uint32_t unit) { return (unit >> 8) & 1; }
uint32_t leaf_value(uint32_t unit) { return unit & 0x7FFFFFFFu; }
uint32_t label(uint32_t unit) { return unit & 0x800000FFu; }
uint32_t offset(uint32_t unit) { return (unit >> 10) << ((unit & 0x200u) >> 6); }

void append_with_spaces(std::string_view text, std::string& out) {
    for (size_t at = 0;;) {
        const size_t found = text.find(kSpaceSymbol, at);
        if (found == std::string_view::npos) {
            out.append(text.substr(at));
            return;
        }
        out.append(text.substr(at, found - at));
        out.push_back(' ');
        at = found + kSpaceSymbol.size();
    }
}

}  // namespace

SentencePieceNormalizer::SentencePieceNormalizer(const SentencePieceModel& model)
    : add_dummy_prefix_(model.add_dummy_prefix),
      remove_extra_whitespaces_(model.remove_extra_whitespaces) {
    if (model.charsmap.empty()) return;
    uint32_t trie_bytes = 0;
    if (model.charsmap.size() >= 4) std::memcpy(&trie_bytes, model.charsmap.data(), 4);
    if (trie_bytes < 4 || trie_bytes % 4 != 0 || trie_bytes > model.charsmap.size() - 4)
        throw InputError("the model's character map is malformed");
    units_.resize(trie_bytes / 4);
    std::memcpy(units_.data(), model.charsmap.data() + 4, trie_bytes);
    replacements_ = model.charsmap.substr(4 + trie_bytes);
    replacements_.push_back('\0');
}

std::pair<std::string_view, size_t> SentencePieceNormalizer::next(std::string_view text) const {
    size_t best = 0;
    uint32_t value = 0;
    if (!units_.empty()) {
        size_t node = offset(units_[0]);
        for (size_t i = 0; i < text.size(); ++i) {
            const auto byte = uint8_t(text[i]);
            node ^= byte;
            if (node >= units_.size() || label(units_[node]) != byte) break;
            const uint32_t unit = units_[node];
            node ^= offset(unit);
            if (has_leaf(unit)) {
                if (node >= units_.size()) break;
                best = i + 1;
                value = leaf_value(units_[node]);
            }
        }
    }
    if (best > 0 && value < replacements_.size()) return {replacements_.c_str() + value, best};
    const auto length = size_t(utf8::length(uint8_t(text[0])));
    return {text.substr(0, length), length};
}

void SentencePieceNormalizer::normalize(std::string_view text, std::string& out) const {
    out.clear();
    if (only_adds_prefix()) {
        if (text.empty()) return;
        if (add_dummy_prefix_) out.push_back(' ');
        append_with_spaces(text, out);
        return;
    }
    if (remove_extra_whitespaces_) {
        while (!text.empty()) {
            const auto [replacement, length] = next(text);
            if (replacement != " ") break;
            text.remove_prefix(length);
        }
    }
    if (text.empty()) return;
    if (add_dummy_prefix_) out.push_back(' ');
    bool after_space = remove_extra_whitespaces_;
    while (!text.empty()) {
        auto [replacement, length] = next(text);
        while (after_space && !replacement.empty() && replacement[0] == ' ')
            replacement.remove_prefix(1);
        if (!replacement.empty()) {
            append_with_spaces(replacement, out);
            after_space = remove_extra_whitespaces_ && replacement.back() == ' ';
        }
        text.remove_prefix(length);
    }
    if (remove_extra_whitespaces_)
        while (!out.empty() && out.back() == ' ') out.pop_back();
}

}  // namespace fastllm
