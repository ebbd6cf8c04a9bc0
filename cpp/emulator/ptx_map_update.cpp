// Tensor maps that a kernel modifies: tensormap.replace, tensormap.cp_fenceproxy and
// fence.proxy.tensormap.
//
// A kernel changes a map in shared memory and publishes it by a copy to global memory; a thread
// sees it there after a fence of its own, if the two are ordered. Of what else a launch writes into
// a map copies see nothing. A map must be left alone until cp.async.bulk.wait_group has covered the
// stores that use it. Not checked: that no load uses it any more, for which there is no such wait;
// CUTLASS changes the maps of loads that may be under way.
#include <algorithm>
#include <cstring>
#include <vector>

#include "block.hpp"
#include "device_memory.hpp"
#include "emulator.hpp"
#include "ptx_tensor_map.hpp"
#include "ptx_values.hpp"
#include "report.hpp"

namespace emulator::ptx {
namespace {

constexpr std::size_t kMapBytes = 128;
constexpr std::uint64_t kAlignment = 64;

[[noreturn]] void refuse_map(Warp& w, unsigned lane, int line, const char* why) {
    w.block->about(w, lane);
    report("tensor-map", "at line %d: %s", line, why);
    throw Abandoned{};
}

void require_aligned(Warp& w, unsigned lane, int line, std::uint64_t at) {
    if (at % kAlignment != 0) refuse_map(w, lane, line, "the map is not aligned to 64 bytes");
}

enum Field : std::uint8_t { kAddress, kSize, kStride };

void set(Warp& w, const Instruction& i, unsigned lane, TensorMap& map, std::uint64_t value) {
    switch (i.detail) {
        case kAddress:
            if (value % 16 != 0) refuse_map(w, lane, i.line, "a tensor not aligned to 16 bytes");
            map.address = value;
            return;
        case kSize:
            if (i.number < map.rank && static_cast<std::uint32_t>(value) == 0) {
                refuse_map(w, lane, i.line, "a dimension of no elements");
            }
            map.size[i.number] = static_cast<std::uint32_t>(value);
            return;
        default:
            if (i.number + 1 >= map.rank) return;  // of a dimension that the map has not
            if (value % 16 != 0 || value >= TensorMap::kMostStride) {
                refuse_map(w, lane, i.line,
                           "a stride that is no multiple of 16 bytes or too large");
            }
            map.stride[i.number] = value;
    }
}

// rows: address in shared memory, value; detail: the field; number: the dimension.
Flow replace(Warp& w, const Instruction& i, std::uint32_t lanes) {
    for_lanes(lanes, [&](unsigned l) {
        const std::uint64_t at = w.row(i.rows[0])[l] + static_cast<std::uint64_t>(i.offset);
        require_aligned(w, l, i.line, at);
        unsigned char* first = nullptr;
        for (const Access kind : {Access::kRead, Access::kWrite}) {
            for (std::size_t n = kMapBytes; n > 0; n -= 16) {
                first = w.block->reach(w, l, Space::kShared, at + n - 16, 16, kind, i.line);
            }
        }
        TensorMap map;
        std::memcpy(&map, first, sizeof map);
        if (map.magic != TensorMap::kMagic) refuse_map(w, l, i.line, "no tensor map is there");
        set(w, i, l, map, w.row(i.rows[1])[l]);
        std::memcpy(first, &map, sizeof map);
    });
    return Flow::kNext;
}

// rows: address in global memory, address in shared memory.
Flow publish(Warp& w, const Instruction& i, std::uint32_t lanes) {
    if (lanes != w.alive()) return Flow::kWait;
    if (lanes != kAllLanes) refuse_map(w, 0, i.line, "the warp has not 32 lanes");
    const std::uint64_t to = w.row(i.rows[0])[0];
    const std::uint64_t from = w.row(i.rows[1])[0];
    require_aligned(w, 0, i.line, to);
    require_aligned(w, 0, i.line, from);
    for (unsigned l = 0; l < 32; ++l) {
        if (w.row(i.rows[0])[l] != to || w.row(i.rows[1])[l] != from) {
            refuse_map(w, l, i.line, "lanes of the warp have different maps");
        }
    }
    w.block->publish_map(w, from, to, i.line);
    return Flow::kNext;
}

// rows: address.
Flow acquire(Warp& w, const Instruction& i, std::uint32_t lanes) {
    for_lanes(lanes, [&](unsigned l) { w.block->acquire_map(w, l, w.row(i.rows[0])[l]); });
    return Flow::kNext;
}

void plain_address(Decoding& d, const std::string& text, Instruction& out, std::size_t row) {
    Instruction other;
    d.address(text, other, row);
    if (other.offset != 0) d.refuse();
    out.rows[row] = other.rows[row];
}

void replacing(Decoding& d, Instruction& out) {
    if (!d.take("tile")) d.refuse();
    const std::string field = d.take_any({"global_address", "global_dim", "global_stride"});
    if (field.empty() || !d.take("shared::cta") || !d.take("b1024")) d.refuse();
    out.detail = field == "global_address" ? kAddress : field == "global_dim" ? kSize : kStride;
    const int bits = out.detail == kSize ? 32 : 64;
    if (!(d.take_type() == Type{'b', bits, false})) d.refuse();
    const bool numbered = out.detail != kAddress;
    require_operands(d, numbered ? 3 : 2);
    d.address(d.operand(0), out, 0);
    if (numbered) {
        const std::int64_t dimension = d.integer(d.operand(1));
        if (dimension < 0 || dimension >= (out.detail == kSize ? 5 : 4)) d.refuse();
        out.number = static_cast<std::uint32_t>(dimension);
    }
    out.rows[1] = d.source(d.operand(numbered ? 2 : 1));
    out.run = &replace;
}

void take_scope(Decoding& d) {
    if (d.take_any({"cta", "cluster", "gpu", "sys"}).empty()) d.refuse();
}

void require_whole_map(Decoding& d, std::size_t operand) {
    if (d.integer(d.operand(operand)) != static_cast<std::int64_t>(kMapBytes)) d.refuse();
}

}  // namespace

// The copy is one operation of all lanes and in the program order of each. So what it reads must be
// ordered before more than one of them, and it is remembered as the first one's.
void Block::publish_map(Warp& warp, std::uint64_t from, std::uint64_t to, int line) {
    for (std::size_t n = 0; n < kMapBytes; n += 16) {
        reach(warp, 0, Space::kShared, from + n, 16, Access::kRead, line);
        const auto cells = cells_.begin() + static_cast<std::ptrdiff_t>((from & 0xffffffffu) + n);
        const std::vector<Cell> remembered(cells, cells + 16);
        const unsigned char* source =
            reach(warp, 31, Space::kShared, from + n, 16, Access::kRead, line);
        std::copy(remembered.begin(), remembered.end(), cells);
        std::memcpy(reach(warp, 0, Space::kGlobal, to + n, 16, Access::kWrite, line), source, 16);
    }
    maps_[to] = {advance_time(), warp.index};
}

void Block::acquire_map(Warp& warp, unsigned lane, std::uint64_t at) {
    const auto it = maps_.find(at);
    if (it == maps_.end()) return;
    const auto& [when, publisher] = it->second;
    // The copy is the whole warp's.
    if (publisher != warp.index && !ordered(warp, lane, publisher * 32, when - 1)) return;
    warp.maps_seen[at][lane] = when;
}

const unsigned char* Block::reach_map(Warp& warp, unsigned lane, std::uint64_t at, int line) {
    if ((at & kWindowMask) != 0) {  // a parameter
        reach(warp, lane, Space::kGeneric, at + kMapBytes - 8, 8, Access::kRead, line);
        return reach(warp, lane, Space::kGeneric, at, 8, Access::kRead, line);
    }
    const auto* map = reinterpret_cast<const unsigned char*>(at);
    const DeviceBuffer* nearest = nullptr;
    const DeviceBuffer* buffer = find_buffer(map, kMapBytes, &nearest);
    if (buffer == nullptr) refuse_map(warp, lane, line, "the map is not in device memory");
    require_aligned(warp, lane, line, at);
    Time published = kNever;
    if (const auto it = maps_.find(at); it != maps_.end()) published = it->second.first;
    for (std::size_t n = 0; options().check && n < kMapBytes; ++n) {
        const Time written =
            buffer->cells[static_cast<std::size_t>(map - buffer->base) + n].written;
        if (written == kNever) refuse_map(warp, lane, line, "nothing wrote the map");
        if (written < launch_started()) continue;
        if (published == kNever || written >= published) {
            refuse_map(
                warp, lane, line,
                "the map was changed in this launch, and not by tensormap.cp_fenceproxy since");
        }
    }
    if (published != kNever && warp.maps_seen[at][lane] != published) {
        about(warp, lane);
        report("proxy-fence",
               "the copy at line %d uses a tensor map that a kernel changed, with no "
               "fence.proxy.tensormap acquire between, or none that is ordered after the change",
               line);
    }
    return map;
}

void Block::hold_map(const Warp& warp, std::uint64_t at) {
    if ((at & kWindowMask) != 0) return;
    const auto* map = reinterpret_cast<const unsigned char*>(at);
    const DeviceBuffer* nearest = nullptr;
    DeviceBuffer* buffer = find_buffer(map, kMapBytes, &nearest);
    if (buffer == nullptr) return;  // already reported
    const auto reader = static_cast<std::uint16_t>(agent_of_store_reads(warp) * 32);
    Cell* cells = buffer->cells.data() + (map - buffer->base);
    for (std::size_t n = 0; n < kMapBytes; ++n) {
        if (cells[n].reader[0] != reader) {
            cells[n].read[1] = cells[n].read[0];
            cells[n].reader[1] = cells[n].reader[0];
        }
        cells[n].read[0] = now();
        cells[n].reader[0] = reader;
    }
}

void decode_map_fence(Decoding& d, Instruction& out) {
    // The release without a copy, for maps changed in global memory, is not known.
    if (!d.take("acquire")) d.refuse();
    take_scope(d);
    require_operands(d, 2);
    require_whole_map(d, 1);
    plain_address(d, d.operand(0), out, 0);
    out.run = &acquire;
}

bool decode_map_update(std::string_view opcode, Decoding& d, Instruction& out) {
    if (opcode != "tensormap") return false;
    if (d.take("replace")) {
        replacing(d, out);
        return true;
    }
    if (!d.take("cp_fenceproxy") || !d.take("global") || !d.take("shared::cta") ||
        !d.take("tensormap::generic") || !d.take("release")) {
        d.refuse();
    }
    take_scope(d);
    if (!d.take("sync") || !d.take("aligned")) d.refuse();
    require_operands(d, 3);
    require_whole_map(d, 2);
    plain_address(d, d.operand(0), out, 0);
    plain_address(d, d.operand(1), out, 1);
    out.run = &publish;
    return true;
}

}  // namespace emulator::ptx
