// Byte-pair merging over ids, shared by the SentencePiece and the byte-level encoders.
//
// State: a row of symbols. Step: among all neighbours (a, b) that the table can merge, take the one
// of lowest rank, the leftmost on ties, and replace it by its result; stop when there is none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "fastllm/huge_pages.hpp"

namespace fastllm {

// (left id, right id) → (rank, merged id), open addressing.
class MergeTable {
  public:
    struct Merge {
        uint32_t rank;  // kNone: these two do not merge
        uint32_t id;
    };
    static constexpr uint32_t kNone = 0xFFFFFFFFu;

    explicit MergeTable(size_t expected = 0) { reserve(expected); }
    void reserve(size_t expected);
    // Keeps the first entry of a pair that is added twice.
    void add(uint32_t left, uint32_t right, Merge merge);
    Merge find(uint32_t left, uint32_t right) const {
        const uint64_t key = uint64_t(left) << 32 | right;
        for (size_t i = slot(key);; i = (i + 1) & mask_) {
            if (entries_[i].key == key) return entries_[i].merge;
            if (entries_[i].key == kEmpty) return {kNone, 0};
        }
    }

  private:
    static constexpr uint64_t kEmpty = ~0ull;
    struct Entry {
        uint64_t key;
        Merge merge;
    };
    size_t slot(uint64_t key) const { return size_t((key * 0x9E3779B97F4A7C15ull) >> 32) & mask_; }

    HugePageVector<Entry> entries_;
    size_t mask_ = 0;
    size_t count_ = 0;
};

// Merges a row of symbols in place. Keeps its scratch memory, so use one per thread.
class BpeMerger {
  public:
    // `ids` holds one symbol each; afterwards the merged row. Time O(n log n).
    void merge(const MergeTable& table, std::vector<uint32_t>& ids);

  private:
    struct Node {
        uint32_t id;
        int64_t prev, next;  // -1: none; prev -2: absorbed by its left neighbour
    };
    struct Candidate {
        uint32_t rank;
        int64_t left;
        uint32_t left_id, right_id, merged;
    };
    void merge_short(const MergeTable& table, std::vector<uint32_t>& ids);
    void merge_long(const MergeTable& table, std::vector<uint32_t>& ids);
    void push(const MergeTable& table, int64_t left);

    std::vector<Node> nodes_;
    std::vector<Candidate> heap_;
};

}  // namespace fastllm
