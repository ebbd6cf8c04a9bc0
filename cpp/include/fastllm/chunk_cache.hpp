// Caches from a piece of text to its token ids. Most pieces have fewer than 16 bytes and few ids:
// for those there is a cache of its own, whose keys are compared as two words.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "fastllm/huge_pages.hpp"

namespace fastllm {

// Sets of two entries in one cache line, for texts of 1 to 15 bytes.
class ShortChunkCache {
  public:
    static constexpr size_t kMaxKey = 15;  // bytes of text
    static constexpr size_t kReadable =
        16;  // bytes that must be readable at a text, whatever its size
    static constexpr size_t kMaxIds = 4;
    static constexpr uint32_t kMaxId = (1u << 24) - 1;

    // The text in words, zero where it has ended, and its size in the last byte.
    struct Key {
        uint64_t low, high;
        friend bool operator==(const Key& a, const Key& b) {
            return ((a.low ^ b.low) | (a.high ^ b.high)) == 0;
        }
    };
    struct alignas(32) Entry {
        Key key;                // zero: empty
        uint32_t ids[kMaxIds];  // the last one's high byte: how many there are
    };

    // 2^log2_entries entries of 32 bytes.
    explicit ShortChunkCache(unsigned log2_entries)
        : shift_(64 - (log2_entries - 1)), entries_(size_t(1) << log2_entries) {}

    static Key key(const uint8_t* text, size_t size) {
        Key key;
        std::memcpy(&key.low, text, 8);
        std::memcpy(&key.high, text + 8, 8);
        key.low &= kMasks.low[size];
        key.high = (key.high & kMasks.high[size]) | uint64_t(size) << 56;
        return key;
    }

    // The two entries where a text is or would be.
    Entry* set(const Key& key) {
        const unsigned __int128 product =
            static_cast<unsigned __int128>(key.low ^ 0xA0761D6478BD642Full) *
            (key.high ^ 0xE7037ED1A0B428DBull);
        const uint64_t hash = (uint64_t(product) ^ uint64_t(product >> 64)) * 0x9E3779B97F4A7C15ull;
        return entries_.data() + (hash >> shift_) * 2;
    }
    // Null if the text is not there.
    static const Entry* find(const Entry* set, const Key& key) {
        const Entry* const entry = set + !(set->key == key);
        return entry->key == key ? entry : nullptr;
    }
    // How many ids there are; 0: more than an entry holds.
    static size_t count(const Entry& entry) { return entry.ids[kMaxIds - 1] >> 24; }
    // Writes all kMaxIds, those that are not there too.
    static void copy_ids(const Entry& entry, uint32_t* out) {
        for (size_t i = 0; i < kMaxIds; ++i) out[i] = entry.ids[i] & kMaxId;
    }
    // Replaces the older of the set's entries.
    static void store(Entry* set, const Key& key, const uint32_t* ids, size_t count) {
        set[1] = set[0];
        set[0].key = key;
        if (count > kMaxIds) count = 0;
        for (size_t i = 0; i < kMaxIds; ++i) set[0].ids[i] = i < count ? ids[i] : 0;
        set[0].ids[kMaxIds - 1] |= uint32_t(count) << 24;
    }

  private:
    struct Masks {
        uint64_t low[kMaxKey + 1], high[kMaxKey + 1];
    };
    static constexpr Masks masks() {
        Masks masks{};
        for (size_t n = 0; n <= kMaxKey; ++n) {
            masks.low[n] = n >= 8 ? ~0ull : (1ull << (8 * n)) - 1;
            masks.high[n] = n <= 8 ? 0 : (1ull << (8 * (n - 8))) - 1;
        }
        return masks;
    }
    static const Masks kMasks;

    unsigned shift_;
    HugePageVector<Entry> entries_;
};

inline constexpr ShortChunkCache::Masks ShortChunkCache::kMasks = ShortChunkCache::masks();

// Sets of two entries, one cache line each, for longer texts and more ids.
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

    // Multiply-fold hash of 1 to kMaxKey bytes.
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
