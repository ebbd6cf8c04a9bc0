#include "fastllm/bytelevel_bpe.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "fastllm/chunk_encoder.hpp"
#include "fastllm/error.hpp"

namespace fastllm {
namespace {

constexpr unsigned kShortCacheLog2 = 19, kLongCacheLog2 = 16;  // 20 MiB a thread
constexpr size_t kPadding = std::max(ChunkEncoder::kPadding, Pretokenizer::kReadable);
constexpr ptrdiff_t kLongPiece = 6;  // bytes: two characters of most scripts
constexpr uint32_t kNoId = 0xFFFFFFFFu;

}  // namespace

ByteLevelBpe::ByteLevelBpe(ByteLevelModel model) : model_(std::move(model)) {
    vocab_size_ = uint32_t(model_.tokens.size());
    std::fill(std::begin(byte_ids_), std::end(byte_ids_), kNoId);
    if (vocab_size_ > MergeTable::kMaxSymbol) throw InputError("the vocabulary is too large");
    joined_.resize(256 * 256);
    IdOf id_of;
    id_of.reserve(model_.tokens.size() * 2);
    for (uint32_t id = 0; id < model_.tokens.size(); ++id) {
        const std::string& token = model_.tokens[id];
        if (token.empty()) continue;
        id_of.emplace(token, id);
        for (size_t i = 1; i < token.size(); ++i)
            joined_[size_t(uint8_t(token[i - 1])) << 8 | uint8_t(token[i])] = true;
        if (token.size() == 1 && byte_ids_[uint8_t(token[0])] == kNoId)
            byte_ids_[uint8_t(token[0])] = id;
    }
    if (std::find(std::begin(byte_ids_), std::end(byte_ids_), kNoId) != std::end(byte_ids_))
        throw InputError("a byte has no token");
    if (model_.merges_by_rank)
        add_ranked_merges(id_of);
    else
        add_listed_merges(id_of);
    if (model_.ignore_merges && !model_.merges_by_rank) find_unmerged(id_of);
    cuts_pieces_ = unmerged_.empty();
    byte_pairs_.resize(256 * 256);
    for (size_t pair = 0; pair < byte_pairs_.size(); ++pair)
        byte_pairs_[pair] = merges_.find(byte_ids_[pair >> 8], byte_ids_[pair & 255]);
    std::stable_sort(model_.special.begin(), model_.special.end(),
                     [](const auto& a, const auto& b) { return a.first.size() > b.first.size(); });
    for (const auto& [text, id] : model_.special) {
        if (text.empty()) throw InputError("a special token has no text");
        special_starts_[uint8_t(text[0])] = true;
        vocab_size_ = std::max(vocab_size_, id + 1);
    }
}

void ByteLevelBpe::add_listed_merges(const IdOf& id_of) {
    std::vector<uint32_t> results;
    results.reserve(model_.merges.size());
    std::string token;
    for (const auto& [left, right] : model_.merges) {
        const std::string number = std::to_string(results.size());
        if (left >= model_.tokens.size() || right >= model_.tokens.size())
            throw InputError("merge " + number + " names an id outside the vocabulary");
        token.assign(model_.tokens[left]).append(model_.tokens[right]);
        const auto found = id_of.find(token);
        if (found == id_of.end()) throw InputError("merge " + number + " makes what is no token");
        results.push_back(found->second);
    }
    if (results.size() > MergeTable::kNone) throw InputError("there are too many merges");
    merges_ = MergeTable(std::move(results));
    for (uint32_t rank = 0; rank < model_.merges.size(); ++rank)
        merges_.add(model_.merges[rank].first, model_.merges[rank].second, rank);
}

// What merging makes of a token's bytes alone is what it makes of them in any text where they end
// up in one token. So a token can come from one pair only: the two symbols that are left of it when
// all shorter tokens are known.
void ByteLevelBpe::add_ranked_merges(const IdOf& id_of) {
    std::vector<uint32_t> results(model_.tokens.size());
    std::iota(results.begin(), results.end(), 0u);
    merges_ = MergeTable(std::move(results));
    BpeMerger merger;
    std::vector<uint32_t> symbols;
    for (const uint32_t id : by_size()) {
        const std::string_view token = model_.tokens[id];
        if (token.size() < 2 || id_of.find(token)->second != id) continue;
        symbols_of(token, symbols);
        merger.merge(merges_, symbols);
        if (symbols.size() == 2)
            merges_.add(symbols[0], symbols[1], id);
        else if (model_.ignore_merges)
            unmerged_.emplace(token, id);
    }
}

// Ids from the shortest token to the longest, and by number where they are equally long.
std::vector<uint32_t> ByteLevelBpe::by_size() const {
    std::vector<uint32_t> start(1);  // where the tokens of each size go; sizes are small
    for (const std::string& token : model_.tokens) {
        if (token.size() + 2 > start.size()) start.resize(token.size() + 2);
        ++start[token.size() + 1];
    }
    std::partial_sum(start.begin(), start.end(), start.begin());
    std::vector<uint32_t> ids(model_.tokens.size());
    for (uint32_t id = 0; id < ids.size(); ++id) ids[start[model_.tokens[id].size()]++] = id;
    return ids;
}

void ByteLevelBpe::find_unmerged(const IdOf& id_of) {
    BpeMerger merger;
    std::vector<uint32_t> symbols;
    for (const auto& [token, id] : id_of) {
        symbols_of(token, symbols);
        merger.merge(merges_, symbols);
        if (symbols.size() != 1 || symbols[0] != id) unmerged_.emplace(token, id);
    }
}

void ByteLevelBpe::symbols_of(std::string_view text, std::vector<uint32_t>& symbols) const {
    symbols.resize(text.size());
    for (size_t i = 0; i < text.size(); ++i) symbols[i] = byte_ids_[uint8_t(text[i])];
}

class ByteLevelBpeThread : public EncoderThread {
  public:
    explicit ByteLevelBpeThread(const ByteLevelBpe& model)
        : m_(model), chunks_(kShortCacheLog2, kLongCacheLog2) {}

    void encode(const std::vector<std::string_view>& texts, IdBuffer& ids,
                std::vector<size_t>& ends) override {
        for (const std::string_view text : texts) {
            text_.assign(text).append(kPadding, '\0');
            const char* const p = text_.data();
            if (m_.model_.special.empty())
                encode_plain(p, p + text.size(), ids);
            else
                encode_around_special(p, p + text.size(), ids);
            ends.push_back(ids.size());
        }
    }

  private:
    void encode_around_special(const char* p, const char* end, IdBuffer& ids) {
        const char* start = p;
        while (p < end) {
            if (!m_.special_starts_[uint8_t(*p)]) {
                ++p;
                continue;
            }
            const auto& special = m_.model_.special;
            const auto found =
                std::find_if(special.begin(), special.end(), [&](const auto& candidate) {
                    return candidate.first.size() <= size_t(end - p) && candidate.first[0] == *p &&
                           std::memcmp(candidate.first.data(), p, candidate.first.size()) == 0;
                });
            if (found == special.end()) {
                ++p;
                continue;
            }
            encode_plain(start, p, ids);
            ids.push_back(found->second);
            p += found->first.size();
            start = p;
        }
        encode_plain(start, end, ids);
    }

    void encode_plain(const char* text, const char* text_end, IdBuffer& ids) {
        const auto* p = reinterpret_cast<const uint8_t*>(text);
        const auto* const end = reinterpret_cast<const uint8_t*>(text_end);
        const uint8_t* cuts[ChunkEncoder::kBatch + 2];
        size_t chunks = 0;
        cuts[0] = p;
        while (p < end) {
            const uint8_t* const next = m_.model_.pretokenizer.next(p, end);
            if (m_.cuts_pieces_ && next - p >= kLongPiece && ((p[0] | p[1]) & 0x80)) {
                // Few bytes of other scripts are neighbours in a token, so most characters are
                // chunks of their own, which repeat as whole pieces do not.
                for (++p; p < next; ++p) {
                    cuts[chunks + 1] = p;
                    chunks += !m_.joined_[size_t(p[-1]) << 8 | p[0]];
                    if (chunks == ChunkEncoder::kBatch) encode_chunks(cuts, chunks, ids);
                }
            }
            p = next;
            cuts[++chunks] = p;
            if (chunks == ChunkEncoder::kBatch) encode_chunks(cuts, chunks, ids);
        }
        encode_chunks(cuts, chunks, ids);
    }

    // Leaves the end of the last chunk as the start of the next.
    void encode_chunks(const uint8_t** cuts, size_t& chunks, IdBuffer& ids) {
        chunks_.encode(
            cuts, chunks, ids, 1,
            [&](const uint8_t* piece, size_t size, uint32_t* out) {
                return encode_piece(reinterpret_cast<const char*>(piece), size, out);
            },
            [](uint32_t*, uint32_t* out) { return out; });
        cuts[0] = cuts[chunks];
        chunks = 0;
    }

    uint32_t* encode_piece(const char* text, size_t size, uint32_t* out) {
        if (!m_.unmerged_.empty()) {
            if (const auto found = m_.unmerged_.find(std::string_view(text, size));
                found != m_.unmerged_.end()) {
                *out = found->second;
                return out + 1;
            }
        }
        m_.symbols_of({text, size}, symbols_);
        numbers_.resize(size);
        for (size_t i = 0; i + 1 < size; ++i)
            numbers_[i] = m_.byte_pairs_[size_t(uint8_t(text[i])) << 8 | uint8_t(text[i + 1])];
        merger_.merge(m_.merges_, symbols_, numbers_);
        return std::copy(symbols_.begin(), symbols_.end(), out);
    }

    const ByteLevelBpe& m_;
    ChunkEncoder chunks_;
    BpeMerger merger_;
    std::string text_;  // padded
    std::vector<uint32_t> symbols_, numbers_;
};

std::unique_ptr<EncoderThread> ByteLevelBpe::thread() const {
    return std::make_unique<ByteLevelBpeThread>(*this);
}

}  // namespace fastllm
