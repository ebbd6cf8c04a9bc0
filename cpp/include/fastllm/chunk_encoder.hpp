// Turns chunks of text into ids through the cache; what the SentencePiece and byte-level encoders
// share.
//
// Chunks are hashed and their cache lines prefetched in batches, so that memory latency overlaps.
#pragma once

#include <cstddef>
#include <cstring>

#include "fastllm/chunk_cache.hpp"
#include "fastllm/encoder.hpp"

namespace fastllm {

class ChunkEncoder {
  public:
    explicit ChunkEncoder(unsigned cache_log2) : cache_(cache_log2) {}

    // Queues text[0…size), which must stay valid until the next flush. `cached` false: always
    // encode.
    void add(const char* text, size_t size, bool cached = true) {
        Chunk& chunk = chunks_[pending_++];
        chunk.text = text;
        chunk.size = size;
        chunk.entry = nullptr;
        bytes_ += size;
        if (cached && size <= ChunkCache::kMaxKey) {
            chunk.entry = cache_.at(ChunkCache::hash(text, size));
            __builtin_prefetch(chunk.entry);
        }
    }
    bool full() const { return pending_ == kBatch; }

    // Appends the ids of all queued chunks. `encode(text, size, out)` returns the end of what it
    // wrote: at most `ids_per_byte` ids a byte. `emitted(from, out)` may change what one chunk
    // gave.
    template <class Encode, class Emitted>
    void flush(IdBuffer& ids, size_t ids_per_byte, const Encode& encode, const Emitted& emitted) {
        uint32_t* out = ids.grow(ids_per_byte * bytes_ + ChunkCache::kMaxIds);
        for (size_t i = 0; i < pending_; ++i) {
            const Chunk& chunk = chunks_[i];
            uint32_t* const from = out;
            if (chunk.entry && ChunkCache::holds(*chunk.entry, chunk.text, chunk.size)) {
                std::memcpy(out, chunk.entry->ids, sizeof chunk.entry->ids);
                out += chunk.entry->count;
            } else {
                out = encode(chunk.text, chunk.size, out);
                if (chunk.entry)
                    ChunkCache::store(*chunk.entry, chunk.text, chunk.size, from,
                                      size_t(out - from));
            }
            out = emitted(from, out);
        }
        pending_ = 0;
        bytes_ = 0;
        ids.advance_to(out);
    }

  private:
    struct Chunk {
        const char* text;
        size_t size;
        ChunkCache::Entry* entry;  // null: not cached
    };
    static constexpr size_t kBatch = 64;

    ChunkCache cache_;
    Chunk chunks_[kBatch];
    size_t pending_ = 0;
    size_t bytes_ = 0;
};

}  // namespace fastllm
