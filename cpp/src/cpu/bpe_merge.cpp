#include "fastllm/bpe_merge.hpp"

#include <algorithm>
#include <utility>

namespace fastllm {
namespace {
// Up to here, rescanning a small array beats a heap.
constexpr size_t kShort = 48;
}  // namespace

void MergeTable::reserve(size_t expected) {
    size_t size = 16;
    while (size < expected * 2) size *= 2;
    HugePageVector<Entry> old(size, Entry{kEmpty, {kNone, 0}});
    old.swap(entries_);
    mask_ = size - 1;
    count_ = 0;
    for (const Entry& entry : old)
        if (entry.key != kEmpty) add(uint32_t(entry.key >> 32), uint32_t(entry.key), entry.merge);
}

void MergeTable::add(uint32_t left, uint32_t right, Merge merge) {
    if ((count_ + 1) * 2 > entries_.size()) reserve(entries_.size());
    const uint64_t key = uint64_t(left) << 32 | right;
    for (size_t i = slot(key);; i = (i + 1) & mask_) {
        if (entries_[i].key == key) return;
        if (entries_[i].key == kEmpty) {
            entries_[i] = {key, merge};
            ++count_;
            return;
        }
    }
}

void BpeMerger::merge(const MergeTable& table, std::vector<uint32_t>& ids) {
    if (ids.size() <= kShort)
        merge_short(table, ids);
    else
        merge_long(table, ids);
}

void BpeMerger::merge_short(const MergeTable& table, std::vector<uint32_t>& ids) {
    MergeTable::Merge with_next[kShort];
    size_t n = ids.size();
    for (size_t i = 0; i + 1 < n; ++i) with_next[i] = table.find(ids[i], ids[i + 1]);
    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; ++i)
            if (with_next[i].rank < with_next[best].rank) best = i;
        if (with_next[best].rank == MergeTable::kNone) break;
        ids[best] = with_next[best].id;
        for (size_t i = best + 1; i + 1 < n; ++i) {
            ids[i] = ids[i + 1];
            with_next[i] = with_next[i + 1];
        }
        --n;
        if (best + 1 < n) with_next[best] = table.find(ids[best], ids[best + 1]);
        if (best > 0) with_next[best - 1] = table.find(ids[best - 1], ids[best]);
    }
    ids.resize(n);
}

void BpeMerger::push(const MergeTable& table, int64_t left) {
    if (left < 0) return;
    const int64_t right = nodes_[size_t(left)].next;
    if (right < 0) return;
    const uint32_t a = nodes_[size_t(left)].id, b = nodes_[size_t(right)].id;
    const MergeTable::Merge merge = table.find(a, b);
    if (merge.rank == MergeTable::kNone) return;
    heap_.push_back({merge.rank, left, a, b, merge.id});
    std::push_heap(heap_.begin(), heap_.end(), [](const Candidate& x, const Candidate& y) {
        return x.rank != y.rank ? x.rank > y.rank : x.left > y.left;
    });
}

void BpeMerger::merge_long(const MergeTable& table, std::vector<uint32_t>& ids) {
    const auto n = int64_t(ids.size());
    nodes_.resize(ids.size());
    for (int64_t i = 0; i < n; ++i)
        nodes_[size_t(i)] = {ids[size_t(i)], i - 1, i + 1 < n ? i + 1 : -1};
    heap_.clear();
    for (int64_t i = 0; i + 1 < n; ++i) push(table, i);
    while (!heap_.empty()) {
        std::pop_heap(heap_.begin(), heap_.end(), [](const Candidate& x, const Candidate& y) {
            return x.rank != y.rank ? x.rank > y.rank : x.left > y.left;
        });
        const Candidate top = heap_.back();
        heap_.pop_back();
        Node& left = nodes_[size_t(top.left)];
        if (left.prev == -2 || left.id != top.left_id || left.next < 0) continue;
        Node& right = nodes_[size_t(left.next)];
        if (right.id != top.right_id) continue;  // one of the two has merged since
        left.id = top.merged;
        left.next = right.next;
        right.prev = -2;
        if (left.next >= 0) nodes_[size_t(left.next)].prev = top.left;
        push(table, left.prev);
        push(table, top.left);
    }
    ids.clear();
    for (int64_t i = n > 0 ? 0 : -1; i >= 0; i = nodes_[size_t(i)].next)
        ids.push_back(nodes_[size_t(i)].id);
}

}  // namespace fastllm
