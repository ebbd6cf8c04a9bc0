// A direct-mapped cache from a short piece of text to its token ids, one cache line an entry.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace fastllm {

class ChunkCache {
  public:
    static constexpr size_t kMaxKey = 34;  // bytes of text
    static constexpr size_t kMaxIds = 7;

    struct alignas(64) Entry {
        uint8_t size;  // of the key; 0: empty
        uint8_t count;
        char key[kMaxKey];
        uint32_t ids[kMaxIds];
    };
    static_assert(sizeof(Entry) == 64, "an entry is a cache line");

    // 2^log2_entries entries of 64 bytes.
    explicit ChunkCache(unsigned log2_entries)
        : mask_((size_t(1) << log2_entries) - 1),
          entries_(static_cast<Entry*>(std::aligned_alloc(64, (mask_ + 1) * sizeof(Entry)))) {
        if (!entries_) throw std::bad_alloc();
        std::memset(static_cast<void*>(entries_.get()), 0, (mask_ + 1) * sizeof(Entry));
    }

    // The entry where a text of this hash is or would be.
    Entry* at(uint64_t hash) { return entries_.get() + (hash & mask_); }

    static bool holds(const Entry& entry, const char* text, size_t size) {
        return entry.size == size && std::memcmp(entry.key, text, size) == 0;
    }
    static void store(Entry& entry, const char* text, size_t size, const uint32_t* ids,
                      size_t count) {
        if (size > kMaxKey || count > kMaxIds) return;
        entry.size = uint8_t(size);
        entry.count = uint8_t(count);
        std::memcpy(entry.key, text, size);
        std::memcpy(entry.ids, ids, count * sizeof(uint32_t));
    }

    // Multiply-fold hash of 1 to kMaxKey bytes; reads no byte outside them.
    static uint64_t hash(const char* p, size_t n) {
        uint64_t a, b;
        if (n >= 8) {
            std::memcpy(&a, p, 8);
            std::memcpy(&b, p + n - 8, 8);
            if (n > 16) {
                uint64_t c, d;
                std::memcpy(&c, p + 8, 8);
                std::memcpy(&d, p + n - 16, 8);
                a ^= c * 0xFF51AFD7ED558CCDull;
                b ^= d * 0xC4CEB9FE1A85EC53ull;
            }
        } else if (n >= 4) {
            uint32_t x, y;
            std::memcpy(&x, p, 4);
            std::memcpy(&y, p + n - 4, 4);
            a = x;
            b = y;
        } else {
            a = uint64_t(uint8_t(p[0])) | uint64_t(uint8_t(p[n >> 1])) << 8 |
                uint64_t(uint8_t(p[n - 1])) << 16;
            b = 0;
        }
        a = (a ^ 0xA0761D6478BD642Full) * 0xE7037ED1A0B428DBull;
        b = (b ^ 0x8EBC6AF09C88C6E3ull ^ n) * 0x589965CC75374CC3ull;
        const uint64_t mixed = (a ^ (b >> 32 | b << 32)) * 0x9E3779B97F4A7C15ull;
        return mixed ^ mixed >> 29;
    }

  private:
    struct Free {
        void operator()(Entry* entries) const { std::free(entries); }
    };
    size_t mask_;
    std::unique_ptr<Entry, Free> entries_;
};

}  // namespace fastllm
