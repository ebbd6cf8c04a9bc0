#include "fastllm/bpe_merge.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace fastllm {
namespace {

// Up to here, looking at every pair again beats a heap. A place takes six bits of a key.
constexpr size_t kShort = 62;
constexpr unsigned kPlaceBits = 6;
constexpr size_t kLanes = 4;  // keys are looked at in steps of this many
constexpr unsigned kRankShift = MergeTable::kNumberBits + kPlaceBits;
constexpr uint64_t kNoKey = uint64_t(MergeTable::kNone) << kRankShift;  // and all above
constexpr uint32_t kBorder = MergeTable::kMaxSymbol + 1;                // merges with nothing

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

void BpeMerger::merge(const MergeTable& table, std::vector<uint32_t>& symbols,
                      const std::vector<uint32_t>& numbers) {
    if (symbols.size() < 2) return;
    if (symbols.size() <= kShort)
        merge_short(table, symbols, numbers.data());
    else
        merge_long(table, symbols);
}

void BpeMerger::merge(const MergeTable& table, std::vector<uint32_t>& symbols) {
    numbers_.clear();
    if (symbols.size() <= kShort)
        for (size_t i = 0; i + 1 < symbols.size(); ++i)
            numbers_.push_back(table.find(symbols[i], symbols[i + 1]));
    merge(table, symbols, numbers_);
}

// Symbols keep their places, from 1 on; those that were absorbed are skipped by `next`. The key of
// a place holds rank, place and number of the merge with the next symbol, so the least key is the
// merge to do. Borders that merge with nothing save the branches for the ends.
void BpeMerger::merge_short(const MergeTable& table, std::vector<uint32_t>& symbols,
                            const uint32_t* numbers) {
    uint64_t keys[kShort + 1 + kLanes];
    uint32_t row[kShort + 2];
    uint8_t next[kShort + 2], previous[kShort + 2];
    const size_t n = symbols.size();
    const auto set = [&](size_t place, uint32_t number) {
        keys[place] = uint64_t(table.rank(number)) << kRankShift |
                      uint64_t(place) << MergeTable::kNumberBits | number;
    };
    row[0] = row[n + 1] = kBorder;
    for (size_t place = 1; place <= n; ++place) {
        row[place] = symbols[place - 1];
        next[place] = uint8_t(place + 1);
        previous[place] = uint8_t(place - 1);
    }
    keys[0] = kNoKey;
    for (size_t place = 1; place < n; ++place) set(place, numbers[place - 1]);
    const size_t end = (n + kLanes) / kLanes * kLanes;
    for (size_t place = n; place < end; ++place) keys[place] = kNoKey;
    while (true) {
        uint64_t least[kLanes] = {keys[0], keys[1], keys[2], keys[3]};
        for (size_t i = kLanes; i < end; i += kLanes)
            for (size_t lane = 0; lane < kLanes; ++lane)
                least[lane] = std::min(least[lane], keys[i + lane]);
        const uint64_t key = std::min(std::min(least[0], least[1]), std::min(least[2], least[3]));
        if (key >= kNoKey) break;
        const size_t left = key >> MergeTable::kNumberBits & ((1u << kPlaceBits) - 1);
        const size_t right = next[left], after = next[right], before = previous[left];
        const uint32_t merged = table.result(uint32_t(key) & MergeTable::kNone);
        row[left] = merged;
        next[left] = uint8_t(after);
        previous[after] = uint8_t(left);
        keys[right] = kNoKey;
        set(left, table.find(merged, row[after]));
        set(before, table.find(row[before], merged));
    }
    size_t count = 0;
    for (size_t place = 1; place <= n; place = next[place]) symbols[count++] = row[place];
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
