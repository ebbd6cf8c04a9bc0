// Sectors of global memory and passes through shared memory, per warp-wide access.
//
// The lanes' accesses that belong to one machine instruction are those from the same place in the
// code, the n-th time each lane comes there.
#include <algorithm>
#include <map>
#include <tuple>
#include <vector>

#include "access.hpp"
#include "block.hpp"
#include "emulator.hpp"

namespace emulator {
namespace {

struct LaneAccess {
    std::uint64_t offset;
    std::size_t bytes;
};

using GroupKey = std::tuple<const void*, unsigned, unsigned>;  // site, warp, n-th time

struct Group {
    bool shared = false;
    std::vector<LaneAccess> lanes;
};

std::map<GroupKey, Group> groups;
std::map<std::pair<const void*, unsigned>, unsigned> visits;  // by site and thread

std::vector<std::uint64_t> units(const LaneAccess* first, std::size_t count, std::uint64_t size) {
    std::vector<std::uint64_t> all;
    for (std::size_t i = 0; i < count; ++i) {
        const std::uint64_t last = (first[i].offset + first[i].bytes - 1) / size;
        for (std::uint64_t u = first[i].offset / size; u <= last; ++u) all.push_back(u);
    }
    std::sort(all.begin(), all.end());
    all.erase(std::unique(all.begin(), all.end()), all.end());
    return all;
}

void count_global(const std::vector<LaneAccess>& lanes) {
    constexpr std::uint64_t kSector = 32;
    const std::uint64_t sectors = units(lanes.data(), lanes.size(), kSector).size();
    std::uint64_t bytes = 0;
    for (const LaneAccess& lane : lanes) bytes += lane.bytes;
    counters().sectors += sectors;
    counters().min_sectors += std::min(sectors, (bytes + kSector - 1) / kSector);
}

// 32 banks of 4 bytes. Lanes that access 8 or 16 bytes are served by half or quarter warps.
void count_shared(const std::vector<LaneAccess>& lanes) {
    constexpr std::uint64_t kBanks = 32;
    const std::size_t bytes = lanes.front().bytes;
    const std::size_t together = bytes >= 16 ? 8 : bytes == 8 ? 16 : 32;
    for (std::size_t begin = 0; begin < lanes.size(); begin += together) {
        const std::size_t count = std::min(together, lanes.size() - begin);
        const auto words = units(lanes.data() + begin, count, 4);
        std::uint64_t of_bank[kBanks] = {};
        std::uint64_t passes = 0;
        for (const std::uint64_t word : words) passes = std::max(passes, ++of_bank[word % kBanks]);
        counters().wavefronts += passes;
        counters().min_wavefronts += (words.size() + kBanks - 1) / kBanks;
    }
}

}  // namespace

void record_transaction(bool shared, std::uint64_t offset, std::size_t bytes, const void* site) {
    const unsigned thread = current_thread().linear;
    const unsigned nth = visits[{site, thread}]++;
    Group& group = groups[{site, thread / 32, nth}];
    group.shared = shared;
    group.lanes.push_back({offset, bytes});
}

void finish_transactions() {
    for (const auto& [key, group] : groups) {
        if (group.shared) {
            count_shared(group.lanes);
        } else {
            count_global(group.lanes);
        }
    }
    groups.clear();
    visits.clear();
}

}  // namespace emulator
