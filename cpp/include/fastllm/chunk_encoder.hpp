// Turns chunks of text into ids through caches; what the SentencePiece and byte-level encoders
// share.
//
// A batch of chunks is hashed and its cache lines are prefetched before the first is looked up, so
// that memory latency overlaps.
#pragma once

#include <cstddef>
#include <cstring>

#include "fastllm/chunk_cache.hpp"
#include "fastllm/encoder.hpp"

namespace fastllm {

class ChunkEncoder {
  public:
    static constexpr size_t kBatch = 128;
    // Bytes that must be readable after the end of a text that is cut into chunks.
    static constexpr size_t kPadding = ShortChunkCache::kReadable;

    // Of the caches' entries: 32 and 64 bytes each.
    ChunkEncoder(unsigned short_log2, unsigned long_log2) : short_(short_log2), long_(long_log2) {}

    // Appends the ids of the chunks cuts[i] … cuts[i + 1], none empty, at most kBatch of them.
    // `encode(text, size, out)` returns the end of what it wrote: at most `ids_per_byte` ids a
    // byte. `emitted(from, out)` may change what one chunk gave.
    template <class Encode, class Emitted>
    void encode(const uint8_t* const* cuts, size_t chunks, IdBuffer& ids, size_t ids_per_byte,
                const Encode& encode, const Emitted& emitted) {
        if (chunks == 0) return;
        Pending pending[kBatch];
        for (size_t i = 0; i < chunks; ++i) pending[i] = prepare(cuts[i], cuts[i + 1]);
        const auto bytes = size_t(cuts[chunks] - cuts[0]);
        uint32_t* out = ids.grow(ids_per_byte * bytes + ChunkCache::kMaxIds);
        for (size_t i = 0; i < chunks; ++i) {
            uint32_t* const from = out;
            const Pending& chunk = pending[i];
            const auto size = size_t(cuts[i + 1] - cuts[i]);
            if (chunk.words) {
                const auto* const found = ShortChunkCache::find(chunk.words, chunk.key);
                const size_t count = found ? ShortChunkCache::count(*found) : 0;
                if (count > 0) {
                    ShortChunkCache::copy_ids(*found, out);
                    out += count;
                } else {
                    out = found ? encode_long(cuts[i], size, out, encode)
                                : encode(cuts[i], size, out);
                    if (!found)
                        ShortChunkCache::store(chunk.words, chunk.key, from, size_t(out - from));
                }
            } else {
                out = encode_long(cuts[i], size, out, encode);
            }
            out = emitted(from, out);
        }
        ids.advance_to(out);
    }

  private:
    struct Pending {
        ShortChunkCache::Key key;
        ShortChunkCache::Entry* words;  // null: too long
    };

    Pending prepare(const uint8_t* text, const uint8_t* end) {
        const auto size = size_t(end - text);
        if (size <= ShortChunkCache::kMaxKey) {
            const ShortChunkCache::Key key = ShortChunkCache::key(text, size);
            ShortChunkCache::Entry* const set = short_.set(key);
            __builtin_prefetch(set);
            return {key, set};
        }
        if (size <= ChunkCache::kMaxKey) {
            const char* const chars = reinterpret_cast<const char*>(text);
            const ChunkCache::Entry* const set = long_.set(ChunkCache::hash(chars, size));
            __builtin_prefetch(set);
            __builtin_prefetch(set + 1);
        }
        return {{0, 0}, nullptr};
    }

    template <class Encode>
    uint32_t* encode_long(const uint8_t* text, size_t size, uint32_t* out, const Encode& encode) {
        if (size > ChunkCache::kMaxKey) return encode(text, size, out);
        const char* const chars = reinterpret_cast<const char*>(text);
        ChunkCache::Entry* const set = long_.set(ChunkCache::hash(chars, size));
        if (const ChunkCache::Entry* const entry = ChunkCache::find(set, chars, size)) {
            std::memcpy(out, entry->ids, sizeof entry->ids);
            return out + entry->count;
        }
        uint32_t* const end = encode(text, size, out);
        ChunkCache::store(set, chars, size, out, size_t(end - out));
        return end;
    }

    ShortChunkCache short_;
    ChunkCache long_;
};

}  // namespace fastllm
