#include "block_encoder.hpp"

#include <limits>

#include "fastllm/error.hpp"
#include "fastllm/utf8.hpp"

namespace fastllm {
namespace {

// What is wrong with one line; caught where lines are counted.
class LineError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

bool is_blank(std::string_view line) {
    return line.find_first_not_of(" \t\r") == std::string_view::npos;
}

}  // namespace

void BlockResult::clear() {
    for (BlockOutput& out : outputs) {
        out.tokens.clear();
        out.lengths.clear();
        out.sequences_per_document.clear();
    }
    bad.clear();
    counts = BuildCounts();
}

BlockEncoder::BlockEncoder(const BuildOptions& options, EncoderThread& encoder)
    : options_(options), encoder_(encoder), json_(options.keys), keys_(options.keys.size()) {}

void BlockEncoder::encode(std::string_view text, BlockResult& result) {
    result.outputs.resize(keys_.size());
    result.clear();
    result.counts.input_bytes = text.size();
    for (KeyTexts& key : keys_) {
        key.texts.clear();
        key.per_document.clear();
    }
    arena_.clear();
    arena_.reserve(text.size());
    read_lines(text, result);
    for (size_t k = 0; k < keys_.size(); ++k)
        write_documents(keys_[k], result.outputs[k], result.counts);
}

void BlockEncoder::read_lines(std::string_view block, BlockResult& result) {
    while (!block.empty()) {
        const size_t newline = block.find('\n');
        const std::string_view line = block.substr(0, newline);
        block.remove_prefix(newline == std::string_view::npos ? block.size() : newline + 1);
        ++result.counts.lines;
        if (options_.format == LineFormat::json && is_blank(line)) {
            ++result.counts.blank_lines;
            continue;
        }
        try {
            if (options_.format == LineFormat::json)
                read_json(line);
            else
                read_text(line);
            ++result.counts.documents;
        } catch (const LineError& error) {
            ++result.counts.bad_lines;
            result.bad.push_back({"", result.counts.lines, error.what(), std::string(line)});
            if (options_.stop_on_error) return;
        }
    }
}

// All keys are checked before any is kept: a line counts for every key or for none.
void BlockEncoder::read_json(std::string_view line) {
    try {
        json_.parse(line.data(), line.data() + line.size());
    } catch (const JsonError& error) {
        throw LineError("column " + std::to_string(error.offset + 1) + ": " + error.what());
    }
    for (size_t k = 0; k < keys_.size(); ++k) {
        const JsonField& field = json_.fields()[k];
        const std::string name = "field \"" + options_.keys[k] + "\"";
        if (field.kind == JsonField::Kind::missing) throw LineError(name + " is missing");
        if (field.kind == JsonField::Kind::other)
            throw LineError(name + " is " + field.type + ", not a string or a list of strings");
        if (field.lone_surrogate)
            throw LineError(name + " holds half of a surrogate pair, which is no character");
    }
    for (size_t k = 0; k < keys_.size(); ++k) {
        const std::vector<std::string_view>& texts = json_.fields()[k].texts;
        for (const std::string_view text : texts) keys_[k].texts.push_back(keep(text, line));
        keys_[k].per_document.push_back(uint32_t(texts.size()));
    }
}

void BlockEncoder::read_text(std::string_view line) {
    if (!line.empty() && line.back() == '\r') line.remove_suffix(1);
    const auto* const begin = reinterpret_cast<const uint8_t*>(line.data());
    const uint8_t* const bad = utf8::find_invalid(begin, begin + line.size());
    if (bad != begin + line.size())
        throw LineError("column " + std::to_string(bad - begin + 1) + ": not UTF-8");
    for (KeyTexts& key : keys_) {
        key.texts.push_back(line);
        key.per_document.push_back(1);
    }
}

// The parser's view, if it points into the input; else a copy that outlives the next line.
std::string_view BlockEncoder::keep(std::string_view text, std::string_view line) {
    if (text.data() >= line.data() && text.data() + text.size() <= line.data() + line.size())
        return text;
    const size_t at = arena_.size();
    arena_.append(text);
    return std::string_view(arena_).substr(at);
}

void BlockEncoder::write_documents(const KeyTexts& key, BlockOutput& out, BuildCounts& counts) {
    ids_.clear();
    ends_.clear();
    encoder_.encode(key.texts, ids_, ends_);
    out.tokens.reserve((ids_.size() + 2 * ends_.size()) * item_size(options_.type));
    for (const std::string_view text : key.texts) counts.text_bytes += text.size();
    size_t text = 0;
    for (const uint32_t texts : key.per_document) {
        uint32_t sequences = 0;
        for (uint32_t i = 0; i < texts; ++i, ++text) {
            const size_t begin = text == 0 ? 0 : ends_[text - 1];
            size_t count = ends_[text] - begin;
            if (count == 0) continue;  // an empty sequence is dropped, as Megatron does
            if (count > size_t(std::numeric_limits<int32_t>::max()) - 2)
                throw InputError("a document has more than 2^31 tokens");
            if (options_.add_bos) {
                append_ids(&options_.bos_id, 1, out.tokens);
                ++count;
            }
            append_ids(ids_.data() + begin, ends_[text] - begin, out.tokens);
            out.lengths.push_back(int32_t(count));
            counts.tokens += count;
            ++sequences;
        }
        const bool eod_only = sequences == 0 && options_.empty == EmptyDocument::eod;
        if (sequences == 0) ++counts.empty_documents;
        if (sequences == 0 && options_.empty == EmptyDocument::skip) continue;
        if (eod_only) {
            out.lengths.push_back(0);
            sequences = 1;
        }
        if (eod_only || (options_.append_eod && sequences > 0)) {
            append_ids(&options_.eod_id, 1, out.tokens);
            ++out.lengths.back();
            ++counts.tokens;
        }
        out.sequences_per_document.push_back(sequences);
    }
}

void BlockEncoder::append_ids(const uint32_t* ids, size_t count, std::vector<char>& out) const {
    const size_t at = out.size();
    out.resize(at + count * item_size(options_.type));
    if (options_.type == TokenType::int32) {
        std::memcpy(out.data() + at, ids, count * 4);
        return;
    }
    auto* const narrow = reinterpret_cast<uint16_t*>(out.data() + at);
    for (size_t i = 0; i < count; ++i) narrow[i] = uint16_t(ids[i]);
}

}  // namespace fastllm
