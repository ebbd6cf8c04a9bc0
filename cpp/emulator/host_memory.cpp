#include "host_memory.hpp"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <iterator>
#include <vector>

namespace emulator {
namespace {

struct Range {
    std::uintptr_t begin;
    std::uintptr_t end;
};

// Readable mappings, by ascending address; neighbours joined.
std::vector<Range> read_mappings() {
    std::vector<Range> found;
    std::FILE* maps = std::fopen("/proc/self/maps", "r");
    if (maps == nullptr) return found;
    char line[512];
    while (std::fgets(line, sizeof line, maps) != nullptr) {
        unsigned long begin = 0;
        unsigned long end = 0;
        char readable = 0;
        if (std::sscanf(line, "%lx-%lx %c", &begin, &end, &readable) != 3) continue;
        if (readable != 'r') continue;
        if (!found.empty() && found.back().end == begin)
            found.back().end = end;
        else
            found.push_back({begin, end});
    }
    std::fclose(maps);
    return found;
}

bool inside(const std::vector<Range>& ranges, std::uintptr_t begin, std::size_t bytes) {
    const auto after =
        std::upper_bound(ranges.begin(), ranges.end(), begin,
                         [](std::uintptr_t address, const Range& r) { return address < r.begin; });
    return after != ranges.begin() && begin < std::prev(after)->end &&
           bytes <= std::prev(after)->end - begin;
}

}  // namespace

bool is_mapped(const void* p, std::size_t bytes) {
    static std::vector<Range> ranges;
    const auto begin = reinterpret_cast<std::uintptr_t>(p);
    if (inside(ranges, begin, bytes)) return true;
    ranges = read_mappings();  // the process may have grown since
    return inside(ranges, begin, bytes);
}

}  // namespace emulator
