#include "fastllm/indexed_dataset.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace fastllm {
namespace {

constexpr size_t kCopyItems = size_t(1) << 16;

std::string lengths_path(const std::string& idx) { return idx + ".lengths"; }
std::string documents_path(const std::string& idx) { return idx + ".documents"; }

}  // namespace

IndexedDatasetWriter::IndexedDatasetWriter(const std::string& bin, const std::string& idx,
                                           TokenType type, const DatasetPosition* resume_at)
    : idx_(idx),
      type_(type),
      bin_(bin, resume_at ? int64_t(resume_at->tokens * item_size(type)) : -1) {
    if (resume_at) at_ = *resume_at;
    lengths_ = std::make_unique<FileWriter>(lengths_path(idx),
                                            resume_at ? int64_t(at_.sequences * 4) : -1);
    documents_ = std::make_unique<FileWriter>(documents_path(idx),
                                              resume_at ? int64_t(at_.documents * 8) : -1);
}

void IndexedDatasetWriter::append(const char* tokens, size_t bytes,
                                  const std::vector<int32_t>& lengths,
                                  const std::vector<uint32_t>& sequences_per_document) {
    bin_.write(tokens, bytes);
    lengths_->write(lengths.data(), lengths.size() * sizeof(int32_t));
    for (const uint32_t count : sequences_per_document) {
        at_.sequences += count;
        const auto boundary = int64_t(at_.sequences);
        documents_->write(&boundary, sizeof boundary);
    }
    at_.documents += sequences_per_document.size();
    at_.tokens += bytes / item_size(type_);
}

void IndexedDatasetWriter::sync() {
    bin_.sync();
    lengths_->sync();
    documents_->sync();
}

void IndexedDatasetWriter::finish() {
    bin_.close();
    lengths_->close_temporary();
    documents_->close_temporary();
    FileWriter out(idx_);
    const uint64_t version = 1, sequences = at_.sequences, boundaries = at_.documents + 1;
    const auto code = uint8_t(type_);
    out.write(kIndexMagic, sizeof kIndexMagic);
    out.write(&version, sizeof version);
    out.write(&code, sizeof code);
    out.write(&sequences, sizeof sequences);
    out.write(&boundaries, sizeof boundaries);
    {
        MappedFile lengths(lengths_path(idx_));
        if (lengths.size() != sequences * 4)
            throw std::runtime_error(lengths.path() + ": unexpected size");
        for (size_t at = 0; at < lengths.size(); at += kCopyItems)
            out.write(lengths.data() + at, std::min(kCopyItems, lengths.size() - at));
        std::vector<int64_t> offsets;
        int64_t offset = 0;
        for (uint64_t i = 0; i < sequences; ++i) {
            int32_t length;
            std::memcpy(&length, lengths.data() + i * 4, 4);
            offsets.push_back(offset);
            offset += int64_t(length) * int64_t(item_size(type_));
            if (offsets.size() == kCopyItems || i + 1 == sequences) {
                out.write(offsets.data(), offsets.size() * sizeof(int64_t));
                offsets.clear();
                lengths.done_before(i * 4);
            }
        }
    }
    {
        const int64_t zero = 0;
        out.write(&zero, sizeof zero);
        MappedFile documents(documents_path(idx_));
        if (documents.size() != at_.documents * 8)
            throw std::runtime_error(documents.path() + ": unexpected size");
        for (size_t at = 0; at < documents.size(); at += kCopyItems) {
            out.write(documents.data() + at, std::min(kCopyItems, documents.size() - at));
            documents.done_before(at);
        }
    }
    out.close();
}

}  // namespace fastllm
