#include "fastllm/bpe_merge.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace fastllm {
namespace {

// Up to here, looking at every pair again beats a heap. A position takes six bits of a key.
constexpr size_t kShort = 64;
constexpr unsigned kPositionBits = 6;
constexpr size_t kLanes = 8;  // keys are looked at in steps of this many
constexpr int32_t kNoKey = int32_t(MergeTable::kNone << kPositionBits);
static_assert(MergeTable::kNumberBits + kPositionBits < 31, "a key is a positive int32");

struct LowerRankFirst {
    template <class Candidate>
    bool operator()(const Candidate& x, const Candidate& y) const {
        return x.rank != y.rank ? x.rank > y.rank : x.left > y.left;
    }
};

}  // namespace

MergeTable::MergeTable(std::vector<uint32_t> results, std::vector<uint32_t> ranks)
    : results_(std::move(results)), ranks_(std::move(ranks)) {
    if (results_.size() > kNone) throw std::length_error("too many merges");
    size_t slots = 16;
    while (slots * 2 < results_.size() * 5) slots *= 2;
    entries_.assign(slots, kEmpty);
    mask_ = slots - 1;
    shift_ = unsigned(64 - __builtin_ctzll(slots));
}

void MergeTable::grow() {
    HugePageVector<uint64_t> old(entries_.size() * 2, kEmpty);
    old.swap(entries_);
    mask_ = entries_.size() - 1;
    --shift_;
    count_ = 0;
    constexpr uint32_t kSymbol = (1u << kSymbolBits) - 1;
    for (const uint64_t entry : old)
        if (entry != kEmpty)
            add(uint32_t(entry >> (kNumberBits + kSymbolBits)),
                uint32_t(entry >> kNumberBits) & kSymbol, uint32_t(entry) & kNone);
}

void MergeTable::add(uint32_t left, uint32_t right, uint32_t number) {
    if (left > kMaxSymbol || right > kMaxSymbol) throw std::length_error("too many symbols");
    if ((count_ + 1) * 2 > entries_.size()) grow();
    const uint64_t key = uint64_t(left) << kSymbolBits | right;
    for (size_t i = slot(key);; i = (i + 1) & mask_) {
        if (entries_[i] >> kNumberBits == key) return;
        if (entries_[i] == kEmpty) {
            entries_[i] = key << kNumberBits | number;
            ++count_;
            return;
        }
    }
}

void BpeMerger::merge(const MergeTable& table, std::vector<uint32_t>& symbols) {
    if (symbols.size() < 2) return;
    if (symbols.size() <= kShort)
        merge_short(table, symbols);
    else
        merge_long(table, symbols);
}

// Symbols keep their places; those that were absorbed are skipped by `next`. The key of a place is
// rank and position of the merge with the next symbol, so the least key is the merge to do.
void BpeMerger::merge_short(const MergeTable& table, std::vector<uint32_t>& symbols) {
    int32_t keys[kShort + kLanes];
    uint32_t numbers[kShort + 1];
    uint8_t next[kShort + 1], previous[kShort + 1];
    const size_t n = symbols.size();
    uint32_t* const row = symbols.data();
    const auto set = [&](size_t i, uint32_t number) {
        numbers[i] = number;
        keys[i] = int32_t(table.rank(number) << kPositionBits | uint32_t(i));
    };
    for (size_t i = 0; i < n; ++i) {
        next[i] = uint8_t(i + 1);
        previous[i] = uint8_t(i - 1);
    }
    for (size_t i = 0; i + 1 < n; ++i) set(i, table.find(row[i], row[i + 1]));
    const size_t end = (n + kLanes - 1) / kLanes * kLanes;
    for (size_t i = n - 1; i < end; ++i) keys[i] = kNoKey;
    while (true) {
        int32_t least = kNoKey;
        for (size_t i = 0; i < end; i += kLanes)
            for (size_t lane = 0; lane < kLanes; ++lane) least = std::min(least, keys[i + lane]);
        if (least == kNoKey) break;
        const size_t left = size_t(least) % kShort, right = next[left], after = next[right];
        row[left] = table.result(numbers[left]);
        next[left] = uint8_t(after);
        keys[right] = kNoKey;
        if (after < n) {
            previous[after] = uint8_t(left);
            set(left, table.find(row[left], row[after]));
        } else {
            keys[left] = kNoKey;
        }
        if (left > 0) {
            const size_t before = previous[left];
            set(before, table.find(row[before], row[left]));
        }
    }
    size_t count = 0;
    for (size_t i = 0; i < n; i = next[i]) row[count++] = row[i];
    symbols.resize(count);
}

void BpeMerger::push(const MergeTable& table, int64_t left) {
    if (left < 0) return;
    const int64_t right = nodes_[size_t(left)].next;
    if (right < 0) return;
    const uint32_t a = nodes_[size_t(left)].symbol, b = nodes_[size_t(right)].symbol;
    const uint32_t number = table.find(a, b);
    if (number == MergeTable::kNone) return;
    heap_.push_back({table.rank(number), left, a, b, table.result(number)});
    std::push_heap(heap_.begin(), heap_.end(), LowerRankFirst());
}

void BpeMerger::merge_long(const MergeTable& table, std::vector<uint32_t>& symbols) {
    const auto n = int64_t(symbols.size());
    nodes_.resize(symbols.size());
    for (int64_t i = 0; i < n; ++i)
        nodes_[size_t(i)] = {symbols[size_t(i)], i - 1, i + 1 < n ? i + 1 : -1};
    heap_.clear();
    for (int64_t i = 0; i + 1 < n; ++i) push(table, i);
    while (!heap_.empty()) {
        std::pop_heap(heap_.begin(), heap_.end(), LowerRankFirst());
        const Candidate top = heap_.back();
        heap_.pop_back();
        Node& left = nodes_[size_t(top.left)];
        if (left.prev == -2 || left.symbol != top.left_symbol || left.next < 0) continue;
        Node& right = nodes_[size_t(left.next)];
        if (right.symbol != top.right_symbol) continue;  // one of the two has merged since
        left.symbol = top.merged;
        left.next = right.next;
        right.prev = -2;
        if (left.next >= 0) nodes_[size_t(left.next)].prev = top.left;
        push(table, left.prev);
        push(table, top.left);
    }
    symbols.clear();
    for (int64_t i = 0; i >= 0; i = nodes_[size_t(i)].next)
        symbols.push_back(nodes_[size_t(i)].symbol);
}

}  // namespace fastllm
