#include "fastllm/bytelevel_bpe.hpp"

#include <algorithm>
#include <cstring>

#include "fastllm/chunk_encoder.hpp"
#include "fastllm/error.hpp"

namespace fastllm {
namespace {

constexpr unsigned kCacheLog2 = 18;  // 16 MiB a thread
constexpr uint32_t kNoId = 0xFFFFFFFFu;

}  // namespace

ByteLevelBpe::ByteLevelBpe(ByteLevelModel model) : model_(std::move(model)) {
    vocab_size_ = uint32_t(model_.tokens.size());
    std::fill(std::begin(byte_ids_), std::end(byte_ids_), kNoId);
    id_of_.reserve(model_.tokens.size() * 2);
    for (uint32_t id = 0; id < model_.tokens.size(); ++id) {
        const std::string& token = model_.tokens[id];
        if (token.empty()) continue;
        id_of_.emplace(token, id);
        if (token.size() == 1 && byte_ids_[uint8_t(token[0])] == kNoId)
            byte_ids_[uint8_t(token[0])] = id;
    }
    if (std::find(std::begin(byte_ids_), std::end(byte_ids_), kNoId) != std::end(byte_ids_))
        throw InputError("a byte has no token");
    if (model_.merges_by_rank)
        add_ranked_merges();
    else
        add_listed_merges();
    std::stable_sort(model_.special.begin(), model_.special.end(),
                     [](const auto& a, const auto& b) { return a.first.size() > b.first.size(); });
    for (const auto& [text, id] : model_.special) {
        if (text.empty()) throw InputError("a special token has no text");
        special_starts_[uint8_t(text[0])] = true;
        vocab_size_ = std::max(vocab_size_, id + 1);
    }
}

void ByteLevelBpe::add_listed_merges() {
    merges_.reserve(model_.merges.size());
    for (uint32_t rank = 0; rank < model_.merges.size(); ++rank) {
        const auto [left, right] = model_.merges[rank];
        if (left >= model_.tokens.size() || right >= model_.tokens.size())
            throw InputError("merge " + std::to_string(rank) +
                             " names an id outside the vocabulary");
        const auto found = id_of_.find(model_.tokens[left] + model_.tokens[right]);
        if (found == id_of_.end())
            throw InputError("merge " + std::to_string(rank) + " makes what is no token");
        merges_.add(left, right, {rank, found->second});
    }
}

void ByteLevelBpe::add_ranked_merges() {
    merges_.reserve(model_.tokens.size() * 4);
    for (const auto& [token, id] : id_of_) {
        for (size_t cut = 1; cut < token.size(); ++cut) {
            const auto left = id_of_.find(token.substr(0, cut));
            if (left == id_of_.end()) continue;
            const auto right = id_of_.find(token.substr(cut));
            if (right != id_of_.end()) merges_.add(left->second, right->second, {id, id});
        }
    }
}

class ByteLevelBpeThread : public EncoderThread {
  public:
    explicit ByteLevelBpeThread(const ByteLevelBpe& model) : m_(model), chunks_(kCacheLog2) {}

    void encode(const std::vector<std::string_view>& texts, IdBuffer& ids,
                std::vector<size_t>& ends) override {
        for (const std::string_view text : texts) {
            if (m_.model_.special.empty())
                encode_plain(text.data(), text.data() + text.size(), ids);
            else
                encode_around_special(text.data(), text.data() + text.size(), ids);
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
        while (p < end) {
            const uint8_t* const next = m_.model_.pretokenizer.next(p, end);
            chunks_.add(reinterpret_cast<const char*>(p), size_t(next - p));
            if (chunks_.full()) flush(ids);
            p = next;
        }
        flush(ids);
    }

    void flush(IdBuffer& ids) {
        chunks_.flush(
            ids, 1,
            [&](const char* text, size_t size, uint32_t* out) {
                return encode_piece(text, size, out);
            },
            [](uint32_t*, uint32_t* out) { return out; });
    }

    uint32_t* encode_piece(const char* text, size_t size, uint32_t* out) {
        if (m_.model_.ignore_merges) {
            if (const auto found = m_.id_of_.find(std::string_view(text, size));
                found != m_.id_of_.end()) {
                *out = found->second;
                return out + 1;
            }
        }
        symbols_.clear();
        for (size_t i = 0; i < size; ++i) symbols_.push_back(m_.byte_ids_[uint8_t(text[i])]);
        merger_.merge(m_.merges_, symbols_);
        return std::copy(symbols_.begin(), symbols_.end(), out);
    }

    const ByteLevelBpe& m_;
    ChunkEncoder chunks_;
    BpeMerger merger_;
    std::vector<uint32_t> symbols_;
};

std::unique_ptr<EncoderThread> ByteLevelBpe::thread() const {
    return std::make_unique<ByteLevelBpeThread>(*this);
}

}  // namespace fastllm
