#include "fastllm/sentencepiece_model.hpp"

#include <cstring>

#include "fastllm/error.hpp"
#include "fastllm/utf8.hpp"

namespace fastllm {
namespace {

// One message of the protocol buffer wire format, read field by field with every length checked.
class Message {
  public:
    explicit Message(std::string_view all) : rest_(all) {}

    bool next() {
        if (rest_.empty()) return false;
        const uint64_t key = varint();
        number = key >> 3;
        switch (key & 7) {
            case 0:
                value = varint();
                break;
            case 1:
                take(8);
                break;
            case 2:
                bytes = take(varint());
                break;
            case 5:
                bytes = take(4);
                break;
            default:
                throw InputError("not a SentencePiece model: unknown wire type");
        }
        return true;
    }

    uint64_t number = 0;
    uint64_t value = 0;      // of a varint field
    std::string_view bytes;  // of a length-delimited or 4-byte field

  private:
    uint64_t varint() {
        uint64_t result = 0;
        for (int shift = 0; shift < 64; shift += 7) {
            if (rest_.empty()) break;
            const auto byte = uint8_t(rest_[0]);
            rest_.remove_prefix(1);
            result |= uint64_t(byte & 127) << shift;
            if (byte < 128) return result;
        }
        throw InputError("not a SentencePiece model, or one that is cut short");
    }

    std::string_view take(uint64_t size) {
        if (size > rest_.size())
            throw InputError("not a SentencePiece model, or one that is cut short");
        const std::string_view taken = rest_.substr(0, size_t(size));
        rest_.remove_prefix(size_t(size));
        return taken;
    }

    std::string_view rest_;
};

Piece parse_piece(std::string_view bytes) {
    Piece piece;
    for (Message field(bytes); field.next();) {
        if (field.number == 1) piece.text = field.bytes;
        if (field.number == 2 && field.bytes.size() == 4)
            std::memcpy(&piece.score, field.bytes.data(), 4);
        if (field.number == 3) piece.type = PieceType(field.value);
    }
    const auto* const start = reinterpret_cast<const uint8_t*>(piece.text.data());
    if (piece.text.empty() ||
        utf8::find_invalid(start, start + piece.text.size()) != start + piece.text.size())
        throw InputError("not a SentencePiece model: a piece is empty or not UTF-8");
    if (piece.score != piece.score) throw InputError("not a SentencePiece model: a score is NaN");
    return piece;
}

void parse_trainer(std::string_view bytes, SentencePieceModel& model) {
    for (Message field(bytes); field.next();) {
        switch (field.number) {
            case 3:
                model.algorithm = int(field.value);
                break;
            case 24:
                model.treat_whitespace_as_suffix = field.value != 0;
                break;
            case 35:
                model.byte_fallback = field.value != 0;
                break;
            case 45:
                model.unk_piece = field.bytes;
                break;
            case 46:
                model.bos_piece = field.bytes;
                break;
            case 47:
                model.eos_piece = field.bytes;
                break;
            default:
                break;
        }
    }
}

void parse_normalizer(std::string_view bytes, SentencePieceModel& model) {
    for (Message field(bytes); field.next();) {
        switch (field.number) {
            case 2:
                model.charsmap = field.bytes;
                break;
            case 3:
                model.add_dummy_prefix = field.value != 0;
                break;
            case 4:
                model.remove_extra_whitespaces = field.value != 0;
                break;
            case 5:
                model.escape_whitespaces = field.value != 0;
                break;
            default:
                break;
        }
    }
}

}  // namespace

SentencePieceModel SentencePieceModel::parse(std::string_view bytes) {
    SentencePieceModel model;
    for (Message field(bytes); field.next();) {
        if (field.number == 1) model.pieces.push_back(parse_piece(field.bytes));
        if (field.number == 2) parse_trainer(field.bytes, model);
        if (field.number == 3) parse_normalizer(field.bytes, model);
    }
    if (model.pieces.empty()) throw InputError("not a SentencePiece model: it has no pieces");
    return model;
}

int SentencePieceModel::find(std::string_view text) const {
    for (size_t id = 0; id < pieces.size(); ++id)
        if (pieces[id].text == text) return int(id);
    return -1;
}

}  // namespace fastllm
