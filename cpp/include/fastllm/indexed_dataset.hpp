// Megatron's indexed dataset: PREFIX.bin holds token ids, PREFIX.idx says where each sequence lies.
//
//     .bin   token ids, little endian, sequence after sequence, nothing else
//     .idx   "MMIDIDX\0\0", u64 version 1, u8 dtype code, u64 S, u64 D,
//            i32 lengths[S], i64 byte offsets[S], i64 document boundaries[D] (sequence numbers;
//            first 0, last S)
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "fastllm/file.hpp"

namespace fastllm {

constexpr char kIndexMagic[9] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', '\0', '\0'};
constexpr size_t kIndexHeaderBytes = 34;

// The dtype codes that hold token ids here.
enum class TokenType : uint8_t { int32 = 4, uint16 = 8 };
inline size_t item_size(TokenType type) { return type == TokenType::uint16 ? 2 : 4; }

// How far a dataset has been written.
struct DatasetPosition {
    uint64_t tokens = 0;
    uint64_t sequences = 0;
    uint64_t documents = 0;
};

// Writes one dataset in constant memory: `bin` grows at once, lengths and boundaries go to the side
// files `idx + ".lengths"` and `idx + ".documents"`, from which finish() writes `idx`. Both
// stay, so that a finish() that was killed can be done again.
class IndexedDatasetWriter {
  public:
    // Starts empty, or goes on from `resume_at`, a position that sync() made durable.
    IndexedDatasetWriter(const std::string& bin, const std::string& idx, TokenType type,
                         const DatasetPosition* resume_at = nullptr);

    // Appends whole documents: their tokens (already in the file's type), the length of each
    // sequence, and the number of sequences of each document.
    void append(const char* tokens, size_t bytes, const std::vector<int32_t>& lengths,
                const std::vector<uint32_t>& sequences_per_document);
    void sync();
    void finish();
    const DatasetPosition& position() const { return at_; }

  private:
    std::string idx_;
    TokenType type_;
    DatasetPosition at_;
    FileWriter bin_;
    std::unique_ptr<FileWriter> lengths_, documents_;
};

}  // namespace fastllm
