// cp.async under the checker; sectors and wavefronts of warp-wide accesses.
#include <algorithm>
#include <cstring>
#include <vector>

#include "block.hpp"
#include "emulator.hpp"
#include "ptx_machine.hpp"

namespace emulator::ptx {

namespace {

// Distinct units of `size` bytes that the accesses touch; sorted in `units`.
void distinct_units(const std::uint64_t* addresses, std::size_t count, std::size_t bytes,
                    std::uint64_t size, std::vector<std::uint64_t>& units) {
    units.clear();
    for (std::size_t i = 0; i < count; ++i) {
        const std::uint64_t last = (addresses[i] + bytes - 1) / size;
        for (std::uint64_t u = addresses[i] / size; u <= last; ++u) units.push_back(u);
    }
    std::sort(units.begin(), units.end());
    units.erase(std::unique(units.begin(), units.end()), units.end());
}

}  // namespace

void Block::count(Space space, const std::uint64_t* addresses, std::uint32_t lanes,
                  std::size_t bytes) {
    if (!options().count_transactions || !options().check) return;
    std::uint64_t at[32];
    std::size_t n = 0;
    for_lanes(lanes, [&](unsigned l) { at[n++] = addresses[l]; });
    if (space == Space::kGeneric) {
        const std::uint64_t window = at[0] & kWindowMask;
        space = window == 0 ? Space::kGlobal : window == kSharedWindow ? Space::kShared : space;
    }
    std::vector<std::uint64_t> units;
    if (space == Space::kGlobal) {
        constexpr std::uint64_t kSector = 32;
        distinct_units(at, n, bytes, kSector, units);
        counters().sectors += units.size();
        counters().min_sectors += std::min<std::uint64_t>(units.size(), (n * bytes + 31) / kSector);
    } else if (space == Space::kShared) {
        // 32 banks of 4 bytes. Lanes that access 8 or 16 bytes are served by half or quarter warps.
        const std::size_t together = bytes >= 16 ? 8 : bytes == 8 ? 16 : 32;
        for (std::size_t begin = 0; begin < n; begin += together) {
            distinct_units(at + begin, std::min(together, n - begin), bytes, 4, units);
            std::uint64_t of_bank[32] = {};
            std::uint64_t passes = 0;
            for (const std::uint64_t u : units) passes = std::max(passes, ++of_bank[u % 32]);
            counters().wavefronts += passes;
            counters().min_wavefronts += (units.size() + 31) / 32;
        }
    }
}

void Block::issue_copy(Warp& warp, unsigned lane, const PendingCopy& copy) {
    // The write may happen from now on, so it must be ordered after what others did there.
    reach(warp, lane, Space::kShared, copy.to, copy.bytes, Access::kWrite, copy.line);
    if (copy.from_bytes > 0) {
        // Read in pieces that are aligned as the whole is.
        std::size_t piece = copy.from_bytes;
        while (copy.from_bytes % piece != 0 || (piece & (piece - 1)) != 0) --piece;
        for (std::size_t i = 0; i < copy.from_bytes; i += piece) {
            reach(warp, lane, Space::kGeneric, copy.from + i, piece, Access::kRead, copy.line);
        }
    }
    const auto owner = static_cast<std::uint16_t>(warp.thread(lane) + 1);
    std::fill_n(in_flight_.begin() + copy.to, copy.bytes, owner);
    warp.open[lane].push_back(copy);
}

void Block::deliver(Warp& warp, unsigned lane, const std::vector<PendingCopy>& copies) {
    for (const PendingCopy& copy : copies) {
        unsigned char* to = shared_.data() + copy.to;
        std::memset(to, 0, copy.bytes);
        if (copy.from_bytes > 0) {
            std::memcpy(to, reinterpret_cast<const void*>(copy.from), copy.from_bytes);
        }
        for (std::size_t i = 0; i < copy.bytes; ++i) {
            cells_[copy.to + i].written = now();
            cells_[copy.to + i].writer = static_cast<std::uint16_t>(warp.thread(lane));
            in_flight_[copy.to + i] = 0;
        }
    }
}

}  // namespace emulator::ptx
