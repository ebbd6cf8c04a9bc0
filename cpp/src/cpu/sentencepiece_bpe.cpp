#include "fastllm/sentencepiece_bpe.hpp"

#include <algorithm>
#include <cstdio>
#include <unordered_map>

#include "fastllm/chunk_encoder.hpp"
#include "fastllm/error.hpp"
#include "fastllm/utf8.hpp"

namespace fastllm {
namespace {

constexpr uint32_t kSpaceSymbol = 0x2581;
constexpr uint64_t kNoPair = ~0ull;
constexpr unsigned kShortCacheLog2 = 19, kLongCacheLog2 = 16;  // 20 MiB a thread
constexpr ptrdiff_t kStretch = 64;  // bytes that are cut before the number of chunks is looked at

const uint8_t* bytes_of(const std::string& text) {
    return reinterpret_cast<const uint8_t*>(text.data());
}

// Pieces as they are looked up here: a space for each U+2581.
std::string with_spaces(const std::string& piece) {
    std::string out;
    for (size_t i = 0; i < piece.size();) {
        const int n = utf8::length(uint8_t(piece[i]));
        if (utf8::decode(bytes_of(piece) + i, n) == kSpaceSymbol)
            out.push_back(' ');
        else
            out.append(piece, i, size_t(n));
        i += size_t(n);
    }
    return out;
}

size_t count_characters(const std::string& text) {
    size_t count = 0;
    for (size_t i = 0; i < text.size(); i += size_t(utf8::length(uint8_t(text[i])))) ++count;
    return count;
}

uint64_t pair_hash(uint64_t key) { return (key * 0x9E3779B97F4A7C15ull) >> 24; }

}  // namespace

std::string SentencePieceBpe::unsupported(const SentencePieceModel& model) {
    if (model.algorithm != SentencePieceModel::bpe) return "the model is not of type BPE";
    if (!model.escape_whitespaces) return "the model does not escape white space";
    if (model.treat_whitespace_as_suffix) return "the model treats white space as a suffix";
    bool user_symbols = false;
    bool bytes[256] = {};
    for (const Piece& piece : model.pieces) {
        unsigned byte = 0;
        switch (piece.type) {
            case PieceType::normal:
                break;
            case PieceType::unused:
                return "the model has unused pieces";
            case PieceType::user_defined:
                user_symbols = true;
                break;
            case PieceType::byte:
                if (std::sscanf(piece.text.c_str(), "<0x%02X>", &byte) == 1 && byte < 256)
                    bytes[byte] = true;
                break;
            default:
                if (count_characters(piece.text) == 1)
                    return "a control piece is a single character";
        }
    }
    if (model.byte_fallback && !std::all_of(bytes, bytes + 256, [](bool known) { return known; }))
        return "the model falls back to bytes but lacks some of the 256 byte pieces";
    if (model.find(model.unk_piece) < 0) return "the model has no unknown piece";
    // A character of a piece that is no piece itself takes a symbol, too; 2^20 are enough for all.
    if (model.pieces.size() > MergeTable::kMaxSymbol / 2) return "the model has a million pieces";
    if (user_symbols && (!model.charsmap.empty() || model.remove_extra_whitespaces))
        return "the model has user-defined pieces and a normalizer";
    return "";
}

SentencePieceBpe::SentencePieceBpe(const SentencePieceModel& model)
    : normalizer_(model),
      vocab_size_(uint32_t(model.pieces.size())),
      byte_fallback_(model.byte_fallback),
      page_of_(0x110000 / kPage, 0),
      characters_(kPage) {
    if (const std::string reason = unsupported(model); !reason.empty()) throw InputError(reason);
    std::unordered_map<std::string, uint32_t> normal;
    size_t length = 0;
    for (uint32_t id = 0; id < vocab_size_; ++id) {
        const Piece& piece = model.pieces[id];
        // A raw space never occurs in normalized text, so such a piece is never matched.
        const bool reachable = piece.text.find(' ') == std::string::npos;
        if (piece.type == PieceType::normal && reachable) {
            normal.emplace(with_spaces(piece.text), id);
            length += piece.text.size();
        } else if (piece.type == PieceType::user_defined && reachable) {
            const std::string text = with_spaces(piece.text);
            user_symbols_[uint8_t(text[0])].push_back({text, id});
            has_user_symbols_ = true;
        } else if (piece.type == PieceType::byte) {
            unsigned byte = 0;
            if (std::sscanf(piece.text.c_str(), "<0x%02X>", &byte) == 1 && byte < 256)
                byte_ids_[byte] = id;
        }
    }
    unk_id_ = uint32_t(model.find(model.unk_piece));
    for (auto& symbols : user_symbols_)
        std::sort(symbols.begin(), symbols.end(), [](const UserSymbol& a, const UserSymbol& b) {
            return a.text.size() > b.text.size();
        });

    for (const auto& [text, id] : normal)
        if (count_characters(text) == 1)
            character_for_write(utf8::decode(bytes_of(text), utf8::length(uint8_t(text[0]))))
                .symbol = id;
    size_t slots = 16;
    while (slots < length * 4) slots *= 2;
    pairs_.assign(slots, kNoPair);
    pairs_mask_ = slots - 1;
    for (const auto& [text, id] : normal) add_piece_characters(text);
    add_merges(model, normal);
    // A U+2581 in the text and a space are one and the same.
    const Character space = character(' ');
    character_for_write(kSpaceSymbol) = space;
}

SentencePieceBpe::Character& SentencePieceBpe::character_for_write(uint32_t cp) {
    uint16_t& page = page_of_[cp / kPage];
    if (page == 0) {
        page = uint16_t(characters_.size() / kPage);
        characters_.resize(characters_.size() + kPage);
    }
    return characters_[size_t(page) * kPage + cp % kPage];
}

// Notes which characters are neighbours in a piece, and gives those that are no piece a symbol.
void SentencePieceBpe::add_piece_characters(const std::string& text) {
    uint32_t left = 0;
    bool first = true;
    for (size_t i = 0; i < text.size();) {
        const int n = utf8::length(uint8_t(text[i]));
        const uint32_t cp = utf8::decode(bytes_of(text) + i, n);
        i += size_t(n);
        Character& character = character_for_write(cp);
        if (character.symbol == kUnknown) {
            character.symbol = vocab_size_ + uint32_t(pseudo_symbols_.size());
            pseudo_symbols_.push_back(cp == ' ' ? kSpaceSymbol : cp);
        }
        if (!first) {
            character.joins_left = true;
            character_for_write(left).joins_right = true;
            if (left < 128 && cp < 128) ascii_joined_[left][cp] = true;
            const uint64_t key = uint64_t(left) << 32 | cp;
            size_t slot = pair_hash(key) & pairs_mask_;
            while (pairs_[slot] != kNoPair && pairs_[slot] != key) slot = (slot + 1) & pairs_mask_;
            pairs_[slot] = key;
        }
        left = cp;
        first = false;
    }
}

// What merging makes of a piece's characters alone is what it makes of them in any text where they
// end up in one token. So a piece can come from one pair only: the two symbols that are left of it
// when all shorter pieces are known.
void SentencePieceBpe::add_merges(const SentencePieceModel& model,
                                  const std::unordered_map<std::string, uint32_t>& pieces) {
    std::vector<std::pair<std::string_view, uint32_t>> by_size(pieces.begin(), pieces.end());
    std::vector<uint32_t> results;
    for (const auto& [text, id] : by_size) results.push_back(id);
    const auto score = [&](uint32_t id) { return model.pieces[id].score; };
    std::sort(results.begin(), results.end(), [&](uint32_t a, uint32_t b) {
        return score(a) != score(b) ? score(a) > score(b) : a < b;
    });
    // Equal scores share a rank: then the leftmost pair wins, as in SentencePiece.
    std::vector<uint32_t> ranks(results.size()), number_of(vocab_size_);
    for (uint32_t n = 0; n < results.size(); ++n) {
        const bool tie = n > 0 && score(results[n]) == score(results[n - 1]);
        ranks[n] = tie ? ranks[n - 1] : n;
        number_of[results[n]] = n;
    }
    merges_ = MergeTable(std::move(results), std::move(ranks));
    std::sort(by_size.begin(), by_size.end(), [](const auto& a, const auto& b) {
        return a.first.size() != b.first.size() ? a.first.size() < b.first.size()
                                                : a.second < b.second;
    });
    BpeMerger merger;
    std::vector<uint32_t> symbols;
    for (const auto& [text, id] : by_size) {
        const auto* const p = reinterpret_cast<const uint8_t*>(text.data());
        symbols.clear();
        for (size_t i = 0; i < text.size();) {
            const int n = utf8::length(p[i]);
            symbols.push_back(character(utf8::decode(p + i, n)).symbol);
            i += size_t(n);
        }
        if (symbols.size() > 1) merger.merge(merges_, symbols);
        if (symbols.size() == 2) merges_.add(symbols[0], symbols[1], number_of[id]);
    }
}

bool SentencePieceBpe::joined(uint32_t left, uint32_t right) const {
    if ((left | right) < 128) return ascii_joined_[left][right];
    if (!character(left).joins_right || !character(right).joins_left) return false;
    if (left == kSpaceSymbol) left = ' ';
    if (right == kSpaceSymbol) right = ' ';
    const uint64_t key = uint64_t(left) << 32 | right;
    for (size_t slot = pair_hash(key) & pairs_mask_;; slot = (slot + 1) & pairs_mask_) {
        if (pairs_[slot] == key) return true;
        if (pairs_[slot] == kNoPair) return false;
    }
}

class SentencePieceBpeThread : public EncoderThread {
  public:
    explicit SentencePieceBpeThread(const SentencePieceBpe& model)
        : m_(model), chunks_(kShortCacheLog2, kLongCacheLog2) {}

    void encode(const std::vector<std::string_view>& texts, IdBuffer& ids,
                std::vector<size_t>& ends) override {
        for (const std::string_view text : texts) {
            begin_ = ids.size();
            encode_text(text, ids);
            ends.push_back(ids.size());
        }
    }

  private:
    void encode_text(std::string_view text, IdBuffer& ids) {
        if (m_.normalizer_.only_adds_prefix() && !m_.has_user_symbols_) {
            if (text.empty()) return;
            text_.clear();
            if (m_.normalizer_.adds_prefix()) text_.push_back(' ');
            text_.append(text);
        } else {
            m_.normalizer_.normalize(text, text_);
        }
        const size_t size = text_.size();
        text_.append(ChunkEncoder::kPadding, '\0');
        const char* p = text_.data();
        const char* const end = p + size;
        if (m_.has_user_symbols_)
            encode_around_symbols(p, end, ids);
        else
            encode_run(p, end, ids);
    }

    // User-defined pieces are matched first, left to right, longest first, and never merge.
    void encode_around_symbols(const char* p, const char* end, IdBuffer& ids) {
        const char* start = p;
        while (p < end) {
            const auto& symbols = m_.user_symbols_[uint8_t(*p)];
            const auto found =
                std::find_if(symbols.begin(), symbols.end(), [&](const auto& symbol) {
                    return symbol.text.size() <= size_t(end - p) &&
                           std::memcmp(symbol.text.data(), p, symbol.text.size()) == 0;
                });
            if (found == symbols.end()) {
                p += utf8::length(uint8_t(*p));
                continue;
            }
            encode_run(start, p, ids);
            ids.push_back(found->id);
            p += found->text.size();
            start = p;
        }
        encode_run(start, end, ids);
    }

    void encode_run(const char* p, const char* end, IdBuffer& ids) {
        if (p == end) return;
        const auto* u = reinterpret_cast<const uint8_t*>(p);
        const auto* const u_end = reinterpret_cast<const uint8_t*>(end);
        const uint8_t* cuts[ChunkEncoder::kBatch + 2];
        size_t chunks = 0;  // whole ones; cuts[chunks] starts the next
        cuts[0] = u;
        int n = utf8::length(*u);
        uint32_t left = utf8::decode(u, n);
        u += n;
        while (u < u_end) {
            if ((left | *u) < 128) {
                // Whether this is a cut is not to be foreseen, so there is no branch on it.
                const uint8_t* const stop = u + std::min(u_end - u, kStretch);
                do {
                    cuts[chunks + 1] = u;
                    chunks += !m_.ascii_joined_[left][*u];
                    left = *u++;
                } while (u < stop && *u < 128);
            } else {
                n = utf8::length(*u);
                const uint32_t right = utf8::decode(u, n);
                if (!m_.joined(left, right)) cuts[++chunks] = u;
                left = right;
                u += n;
            }
            if (chunks + size_t(kStretch) >= ChunkEncoder::kBatch) {
                encode_chunks(cuts, chunks, ids);
                cuts[0] = cuts[chunks];
                chunks = 0;
            }
        }
        cuts[++chunks] = u_end;
        encode_chunks(cuts, chunks, ids);
    }

    void encode_chunks(const uint8_t* const* cuts, size_t chunks, IdBuffer& ids) {
        // A byte gives at most one id, but a space without a piece gives the three bytes of U+2581.
        chunks_.encode(
            cuts, chunks, ids, 3,
            [&](const uint8_t* text, size_t size, uint32_t* out) {
                return encode_chunk(text, size, out);
            },
            [&](uint32_t* from, uint32_t* out) {
                // SentencePiece writes one unknown id for a whole run of unknown characters.
                if (m_.byte_fallback_ || *from != m_.unk_id_ || from == ids.data() + begin_ ||
                    from[-1] != m_.unk_id_)
                    return out;
                std::memmove(from, from + 1, size_t(out - from - 1) * sizeof(uint32_t));
                return out - 1;
            });
    }

    uint32_t* encode_chunk(const uint8_t* p, size_t size, uint32_t* out) {
        const uint8_t* const end = p + size;
        symbols_.clear();
        while (p < end) {
            const int n = utf8::length(*p);
            const uint32_t cp = utf8::decode(p, n);
            const uint32_t symbol = m_.character(cp).symbol;
            if (symbol == SentencePieceBpe::kUnknown)
                return put_unknown(cp, out);  // always a chunk alone
            symbols_.push_back(symbol);
            p += n;
        }
        if (symbols_.size() > 1) merger_.merge(m_.merges_, symbols_);
        const uint32_t* const first = out;
        for (const uint32_t symbol : symbols_) {
            if (symbol < m_.vocab_size_)
                *out++ = symbol;
            else if (m_.byte_fallback_ || out == first || out[-1] != m_.unk_id_)
                out = put_unknown(m_.pseudo_symbols_[symbol - m_.vocab_size_], out);
        }
        return out;
    }

    uint32_t* put_unknown(uint32_t cp, uint32_t* out) const {
        if (!m_.byte_fallback_) {
            *out++ = m_.unk_id_;
            return out;
        }
        char bytes[4];
        const int n = utf8::encode(cp, bytes);
        for (int i = 0; i < n; ++i) *out++ = m_.byte_ids_[uint8_t(bytes[i])];
        return out;
    }

    const SentencePieceBpe& m_;
    ChunkEncoder chunks_;
    BpeMerger merger_;
    std::string text_;
    std::vector<uint32_t> symbols_;
    size_t begin_ = 0;  // where the current text's ids start
};

std::unique_ptr<EncoderThread> SentencePieceBpe::thread() const {
    return std::make_unique<SentencePieceBpeThread>(*this);
}

}  // namespace fastllm
