// Byte-pair merging over symbols, shared by the SentencePiece and the byte-level encoders.
//
// State: a row of symbols. Step: among all neighbours (a, b) that the table can merge, take the one
// of lowest rank, the leftmost on ties, and replace it by its result; stop when there is none.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "fastllm/huge_pages.hpp"

namespace fastllm {

// (left symbol, right symbol) → merge, open addressing in words of eight bytes, so that the table
// of a vocabulary stays in the processor's second cache.
//
// Merges are numbered by rank; merges of one rank have numbers of their own, one after another.
class MergeTable {
  public:
    static constexpr unsigned kSymbolBits = 21, kNumberBits = 22;
    static constexpr uint32_t kMaxSymbol = (1u << kSymbolBits) - 2;
    static constexpr uint32_t kNone = (1u << kNumberBits) - 1;  // these two do not merge

    // `results[n]` is the symbol that merge n gives. `ranks[n]`, rising, is needed only if merges
    // share ranks. Throws std::length_error for more than the bits hold.
    explicit MergeTable(std::vector<uint32_t> results = {}, std::vector<uint32_t> ranks = {});

    // Keeps the first entry of a pair that is added twice. Throws std::length_error.
    void add(uint32_t left, uint32_t right, uint32_t number);

    uint32_t find(uint32_t left, uint32_t right) const {
        const uint64_t key = uint64_t(left) << kSymbolBits | right;
        for (size_t i = slot(key);; i = (i + 1) & mask_) {
            const uint64_t entry = entries_[i];
            if (entry >> kNumberBits == key || entry == kEmpty) return uint32_t(entry) & kNone;
        }
    }
    uint32_t result(uint32_t number) const { return results_[number]; }
    uint32_t rank(uint32_t number) const {
        return ranks_.empty() || number == kNone ? number : ranks_[number];
    }

  private:
    static constexpr uint64_t kEmpty = ~0ull;
    size_t slot(uint64_t key) const { return size_t((key * 0x9E3779B97F4A7C15ull) >> shift_); }
    void grow();

    std::vector<uint32_t> results_, ranks_;
    HugePageVector<uint64_t> entries_;  // left, right, number
    unsigned shift_ = 0;
    size_t mask_ = 0;
    size_t count_ = 0;
};

// Merges a row of symbols in place. Keeps its scratch memory, so use one per thread.
class BpeMerger {
  public:
    // Time O(n log n).
    void merge(const MergeTable& table, std::vector<uint32_t>& symbols);
    // The same, where the merges of each symbol with the next, as the table has them, are known.
    void merge(const MergeTable& table, std::vector<uint32_t>& symbols,
               const std::vector<uint32_t>& numbers);

  private:
    struct Node {
        uint32_t symbol;
        int64_t prev, next;  // -1: none; prev -2: absorbed by its left neighbour
    };
    struct Candidate {
        uint32_t rank;
        int64_t left;
        uint32_t left_symbol, right_symbol, merged;
    };
    static void merge_short(const MergeTable& table, std::vector<uint32_t>& symbols,
                            const uint32_t* numbers);
    void merge_long(const MergeTable& table, std::vector<uint32_t>& symbols);
    void push(const MergeTable& table, int64_t left);

    std::vector<uint32_t> numbers_;
    std::vector<Node> nodes_;
    std::vector<Candidate> heap_;
};

}  // namespace fastllm
