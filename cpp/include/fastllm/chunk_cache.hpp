// A cache from a short piece of text to its token ids: sets of two entries, one cache line each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "fastllm/huge_pages.hpp"

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
        : mask_((size_t(1) << log2_entries) - 2), entries_(size_t(1) << log2_entries) {}

    // The two entries where a text of this hash is or would be.
    Entry* set(uint64_t hash) { return entries_.data() + (hash & mask_); }

    // The entry of the set that holds the text, or null.
    static const Entry* find(const Entry* set, const char* text, size_t size) {
        if (set[0].size == size && same(set[0].key, text, size)) return set;
        if (set[1].size == size && same(set[1].key, text, size)) return set + 1;
        return nullptr;
    }
    // Replaces the older of the set's entries.
    static void store(Entry* set, const char* text, size_t size, const uint32_t* ids,
                      size_t count) {
        if (size > kMaxKey || count > kMaxIds) return;
        set[1] = set[0];
        Entry& entry = set[0];
        entry.size = uint8_t(size);
        entry.count = uint8_t(count);
        std::memcpy(entry.key, text, size);
        std::memcpy(entry.ids, ids, count * sizeof(uint32_t));
    }

    // Whether n bytes, 1 to kMaxKey, are equal: overlapping words, no call.
    static bool same(const char* a, const char* b, size_t n) {
        if (n >= 8) {
            uint64_t differ = word<uint64_t>(a + n - 8) ^ word<uint64_t>(b + n - 8);
            for (size_t i = 0; i + 8 < n; i += 8)
                differ |= word<uint64_t>(a + i) ^ word<uint64_t>(b + i);
            return differ == 0;
        }
        if (n >= 4)
            return ((word<uint32_t>(a) ^ word<uint32_t>(b)) |
                    (word<uint32_t>(a + n - 4) ^ word<uint32_t>(b + n - 4))) == 0;
        return ((a[0] ^ b[0]) | (a[n >> 1] ^ b[n >> 1]) | (a[n - 1] ^ b[n - 1])) == 0;
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
    template <class T>
    static T word(const char* p) {
        T value;
        std::memcpy(&value, p, sizeof value);
        return value;
    }
    size_t mask_;
    HugePageVector<Entry> entries_;
};

}  // namespace fastllm
