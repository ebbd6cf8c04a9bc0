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
        chunk.set = nullptr;
        bytes_ += size;
        if (cached && size <= ChunkCache::kMaxKey) {
            chunk.set = cache_.set(ChunkCache::hash(text, size));
            __builtin_prefetch(chunk.set);
            __builtin_prefetch(chunk.set + 1);
        }
    }
    // Queues a chunk whose only id is known.
    void add_id(uint32_t id) {
        Chunk& chunk = chunks_[pending_++];
        chunk.text = nullptr;
        chunk.size = id;
        ++bytes_;
    }
    bool full() const { return pending_ == kBatch; }

    // Appends the ids of all queued chunks. `encode(text, size, out)` returns the end of what it
    // wrote: at most `ids_per_byte` ids a byte. `emitted(from, out)` may change what one chunk
    // gave, but not a known id.
    template <class Encode, class Emitted>
    void flush(IdBuffer& ids, size_t ids_per_byte, const Encode& encode, const Emitted& emitted) {
        uint32_t* out = ids.grow(ids_per_byte * bytes_ + ChunkCache::kMaxIds);
        for (size_t i = 0; i < pending_; ++i) {
            const Chunk& chunk = chunks_[i];
            if (!chunk.text) {
                *out++ = uint32_t(chunk.size);
                continue;
            }
            uint32_t* const from = out;
            if (const ChunkCache::Entry* const entry =
                    chunk.set ? ChunkCache::find(chunk.set, chunk.text, chunk.size) : nullptr) {
                std::memcpy(out, entry->ids, sizeof entry->ids);
                out += entry->count;
            } else {
                out = encode(chunk.text, chunk.size, out);
                if (chunk.set)
                    ChunkCache::store(chunk.set, chunk.text, chunk.size, from, size_t(out - from));
            }
            out = emitted(from, out);
        }
        pending_ = 0;
        bytes_ = 0;
        ids.advance_to(out);
    }

  private:
    struct Chunk {
        const char* text;  // null: `size` is the only id
        size_t size;
        ChunkCache::Entry* set;  // null: not cached
    };
    static constexpr size_t kBatch = 64;

    ChunkCache cache_;
    Chunk chunks_[kBatch];
    size_t pending_ = 0;
    size_t bytes_ = 0;
};

}  // namespace fastllm
