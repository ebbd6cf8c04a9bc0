#include "fastllm/packing.hpp"

#include <set>
#include <stdexcept>
#include <string>

namespace fastllm {
namespace {

constexpr int64_t kNone = -1;

// Document numbers, longest first; equal lengths keep their order. A counting sort.
std::vector<int64_t> longest_first(const int32_t* lengths, size_t count, int32_t capacity) {
    std::vector<int64_t> starts(size_t(capacity) + 1, 0);
    for (size_t i = 0; i < count; ++i) {
        if (lengths[i] < 0 || lengths[i] > capacity)
            throw std::invalid_argument("document " + std::to_string(i) + " of length " +
                                        std::to_string(lengths[i]) + " does not fit " +
                                        std::to_string(capacity));
        ++starts[size_t(lengths[i])];
    }
    int64_t at = 0;
    for (int64_t length = capacity; length >= 1; --length) {
        const int64_t here = starts[size_t(length)];
        starts[size_t(length)] = at;
        at += here;
    }
    std::vector<int64_t> order(static_cast<size_t>(at));
    for (size_t i = 0; i < count; ++i)
        if (lengths[i] > 0) order[size_t(starts[size_t(lengths[i])]++)] = int64_t(i);
    return order;
}

// Open packs by the space they have left: a stack for each amount of space.
class OpenPacks {
  public:
    explicit OpenPacks(int32_t capacity) : top_(size_t(capacity) + 1, kNone) {}

    // Takes out the pack with the least space of at least `length`; kNone if there is none.
    int64_t take(int32_t length, int32_t& space) {
        const auto found = spaces_.lower_bound(length);
        if (found == spaces_.end()) return kNone;
        space = *found;
        const int64_t pack = top_[size_t(space)];
        top_[size_t(space)] = below_[size_t(pack)];
        if (top_[size_t(space)] == kNone) spaces_.erase(found);
        return pack;
    }

    void put(int64_t pack, int32_t space) {
        if (size_t(pack) >= below_.size()) below_.resize(size_t(pack) + 1, kNone);
        if (space == 0) return;
        if (top_[size_t(space)] == kNone) spaces_.insert(space);
        below_[size_t(pack)] = top_[size_t(space)];
        top_[size_t(space)] = pack;
    }

  private:
    std::vector<int64_t> top_;    // by space: the pack that came last
    std::vector<int64_t> below_;  // by pack: the one that came before it
    std::set<int32_t> spaces_;    // for which there is a pack
};

}  // namespace

Packing pack_best_fit(const int32_t* lengths, size_t count, int32_t capacity) {
    if (capacity < 1) throw std::invalid_argument("the capacity must be positive");
    const std::vector<int64_t> order = longest_first(lengths, count, capacity);
    OpenPacks open(capacity);
    std::vector<int64_t> pack_of(order.size());
    std::vector<int64_t> sizes;  // documents in each pack
    for (size_t k = 0; k < order.size(); ++k) {
        const int32_t length = lengths[size_t(order[k])];
        int32_t space = capacity;
        int64_t pack = open.take(length, space);
        if (pack == kNone) {
            pack = int64_t(sizes.size());
            sizes.push_back(0);
        }
        open.put(pack, space - length);
        pack_of[k] = pack;
        ++sizes[size_t(pack)];
    }
    Packing result;
    std::vector<int64_t> next;
    int64_t at = 0;
    for (const int64_t size : sizes) {
        next.push_back(at);
        at += size;
        result.ends.push_back(at);
    }
    result.items.resize(order.size());
    for (size_t k = 0; k < order.size(); ++k)
        result.items[size_t(next[size_t(pack_of[k])]++)] = order[k];
    return result;
}

}  // namespace fastllm
