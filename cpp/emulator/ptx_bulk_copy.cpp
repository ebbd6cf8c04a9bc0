// cp.async.bulk: plain and of tensors in tiles (TMA), to and from shared memory.
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "block.hpp"
#include "emulator.hpp"
#include "ptx_tensor_map.hpp"
#include "ptx_values.hpp"
#include "report.hpp"

namespace emulator::ptx {
namespace {

[[noreturn]] void refuse_copy(Warp& w, unsigned lane, int line, const char* why) {
    w.block->about(w, lane);
    report("bulk-copy", "at line %d: %s", line, why);
    throw Abandoned{};
}

// The bytes that the instruction moves, in pieces of at most 16.
struct Tile {
    std::vector<CopyPiece> pieces;
    std::size_t bytes = 0;
};

// rows of an instruction: shared address, global address or tensor map, mbarrier or none, size or
// the coordinates. detail: dimensions, 0 if plain. The three addresses have offsets `number`,
// `offset` and none.
constexpr std::size_t kShared = 0, kGlobal = 1, kMbarrier = 2, kSize = 3, kCoordinates = 3;

std::uint32_t shared_address(Warp& w, const Instruction& i, unsigned lane) {
    return static_cast<std::uint32_t>(w.row(i.rows[kShared])[lane]) + i.number;
}

Tile plain_tile(Warp& w, const Instruction& i, unsigned lane) {
    const std::uint64_t global =
        w.row(i.rows[kGlobal])[lane] + static_cast<std::uint64_t>(i.offset);
    const std::uint32_t shared = shared_address(w, i, lane);
    const auto bytes = static_cast<std::uint32_t>(w.row(i.rows[kSize])[lane]);
    if (bytes % 16 != 0 || global % 16 != 0 || shared % 16 != 0) {
        refuse_copy(w, lane, i.line, "size and addresses must be multiples of 16");
    }
    Tile tile;
    tile.bytes = bytes;
    for (std::uint32_t at = 0; at < bytes; at += 16) {
        tile.pieces.push_back({shared + at, 16, 16, global + at});
    }
    return tile;
}

std::uint64_t map_address(Warp& w, const Instruction& i, unsigned lane) {
    return w.row(i.rows[kGlobal])[lane] + static_cast<std::uint64_t>(i.offset);
}

TensorMap tensor_map(Warp& w, const Instruction& i, unsigned lane) {
    TensorMap map;
    std::memcpy(&map, w.block->reach_map(w, lane, map_address(w, i, lane), i.line), sizeof map);
    if (map.magic != TensorMap::kMagic || map.rank != i.detail) {
        refuse_copy(w, lane, i.line, "no tensor map of so many dimensions");
    }
    return map;
}

// Elements of dimension 0 from `first` on that are inside the tensor, of a piece's `count`.
unsigned inside(std::int64_t first, unsigned count, std::uint32_t size) {
    if (first >= static_cast<std::int64_t>(size)) return 0;
    return static_cast<unsigned>(
        std::min<std::int64_t>(count, static_cast<std::int64_t>(size) - first));
}

Tile tensor_tile(Warp& w, const Instruction& i, unsigned lane) {
    const TensorMap map = tensor_map(w, i, lane);
    const std::uint32_t shared = shared_address(w, i, lane);
    if (shared % 128 != 0) refuse_copy(w, lane, i.line, "the tile is not aligned to 128 bytes");
    std::int64_t begin[5] = {};
    std::size_t rows = 1;
    for (unsigned d = 0; d < map.rank; ++d) {
        begin[d] = static_cast<std::int32_t>(w.row(i.rows[kCoordinates + d])[lane]);
        if (d > 0) rows *= map.box[d];
    }
    // A piece that begins before the tensor would be inside in its latter part only.
    const unsigned elements = 16u / map.element_bytes;
    if (begin[0] < 0 && begin[0] % static_cast<std::int64_t>(elements) != 0) {
        refuse_copy(w, lane, i.line, "not emulated: a first coordinate that splits 16 bytes");
    }
    const std::uint32_t row_bytes = std::uint32_t{map.box[0]} * map.element_bytes;
    Tile tile;
    tile.bytes = rows * row_bytes;
    for (std::size_t row = 0; row < rows; ++row) {
        std::uint64_t global = map.address;
        bool in = true;
        std::size_t rest = row;
        for (unsigned d = 1; d < map.rank; ++d) {
            const std::int64_t x = begin[d] + static_cast<std::int64_t>(rest % map.box[d]);
            rest /= map.box[d];
            in = in && x >= 0 && x < static_cast<std::int64_t>(map.size[d]);
            global += static_cast<std::uint64_t>(x) * map.stride[d - 1];
        }
        for (std::uint32_t at = 0; at < row_bytes; at += 16) {
            const std::int64_t x = begin[0] + at / map.element_bytes;
            const unsigned valid = in && x >= 0 ? inside(x, elements, map.size[0]) : 0;
            tile.pieces.push_back(
                {swizzled(shared + static_cast<std::uint32_t>(row) * row_bytes + at,
                          map.swizzle_bytes),
                 16, static_cast<std::uint16_t>(valid * map.element_bytes),
                 global + static_cast<std::uint64_t>(x) * map.element_bytes});
        }
    }
    return tile;
}

Tile tile_of(Warp& w, const Instruction& i, unsigned lane) {
    return i.detail == 0 ? plain_tile(w, i, lane) : tensor_tile(w, i, lane);
}

Flow load(Warp& w, const Instruction& i, std::uint32_t lanes) {
    for_lanes(lanes, [&](unsigned l) {
        Tile tile = tile_of(w, i, l);
        BulkCopy copy;
        copy.mbarrier = static_cast<std::uint32_t>(w.row(i.rows[kMbarrier])[l]);
        copy.line = i.line;
        copy.bytes = tile.bytes;
        copy.pieces = std::move(tile.pieces);
        w.block->issue_bulk(w, l, std::move(copy));
    });
    return Flow::kNext;
}

// The lanes of which the instruction moves a tile: the machine's instruction takes its operands
// from uniform registers, once for the warp, so lanes with the same ones are one copy. CUTLASS has
// a whole warp execute its stores.
std::uint32_t distinct_copies(Warp& w, const Instruction& i, std::uint32_t lanes) {
    std::uint32_t distinct = 0;
    for_lanes(lanes, [&](unsigned l) {
        bool seen = false;
        for_lanes(distinct, [&](unsigned other) {
            bool same = true;
            for (const Row row : i.rows) {
                same = same && (row == kNoRow || w.row(row)[l] == w.row(row)[other]);
            }
            seen = seen || same;
        });
        if (!seen) distinct |= 1u << l;
    });
    return distinct;
}

Flow store(Warp& w, const Instruction& i, std::uint32_t lanes) {
    for_lanes(lanes, [&](unsigned l) { ++w.stores[l].open; });
    for_lanes(distinct_copies(w, i, lanes), [&](unsigned l) {
        for (const CopyPiece& piece : tile_of(w, i, l).pieces) {
            w.block->store_bulk(w, l, piece, i.line);
        }
        if (i.detail != 0) w.block->hold_map(w, map_address(w, i, l));
    });
    return Flow::kNext;
}

Flow commit(Warp& w, const Instruction&, std::uint32_t lanes) {
    const Time t = advance_time();
    for_lanes(lanes, [&](unsigned l) {
        const BulkStores::Group group{t, std::exchange(w.stores[l].open, 0u)};
        w.stores[l].reading.push_back(group);
        w.stores[l].writing.push_back(group);
    });
    return Flow::kNext;
}

// number: groups that may remain; detail 1: only their reads are waited for.
Flow wait(Warp& w, const Instruction& i, std::uint32_t lanes) {
    Block& block = *w.block;
    for_lanes(lanes, [&](unsigned l) {
        Knowledge knowledge;
        const auto finish = [&](std::deque<BulkStores::Group>& groups, unsigned agent) {
            while (groups.size() > i.number) {
                knowledge.done.learn(agent, groups.front().committed);
                groups.pop_front();
            }
        };
        finish(w.stores[l].reading, block.agent_of_store_reads(w));
        if (i.detail == 0) finish(w.stores[l].writing, block.agent_of_store_writes(w));
        block.acquire(w, 1u << l, knowledge);
    });
    return Flow::kNext;
}

// "[%rd1, {%r1, %r2}]": the address, then the coordinates.
void tensor_operand(Decoding& d, const std::string& text, Instruction& out) {
    if (text.size() < 3 || text.front() != '[') d.refuse();
    const std::vector<std::string> parts =
        split_operands(std::string_view(text).substr(1, text.size() - 2));
    if (parts.size() != 2 || parts[1].front() != '{') d.refuse();
    d.address("[" + parts[0] + "]", out, kGlobal);
    const std::vector<std::string> coordinates =
        split_operands(std::string_view(parts[1]).substr(1, parts[1].size() - 2));
    if (coordinates.size() != out.detail) d.refuse();
    for (std::size_t n = 0; n < coordinates.size(); ++n) {
        out.rows[kCoordinates + n] = d.source(coordinates[n]);
    }
}

void shared_operand(Decoding& d, const std::string& text, Instruction& out) {
    Instruction other;
    d.address(text, other, kShared);
    out.rows[kShared] = other.rows[kShared];
    out.number = static_cast<std::uint32_t>(other.offset);
}

void mbarrier_operand(Decoding& d, const std::string& text, Instruction& out) {
    Instruction other;
    d.address(text, other, kMbarrier);
    if (other.offset != 0) d.refuse();
    out.rows[kMbarrier] = other.rows[kMbarrier];
}

void take_dimensions(Decoding& d, Instruction& out) {
    const std::string dimensions = d.take_any({"1d", "2d", "3d", "4d", "5d"});
    if (dimensions.empty()) d.refuse();
    d.take("tile");
    out.detail = static_cast<std::uint8_t>(dimensions[0] - '0');
}

}  // namespace

void decode_bulk_copy(Decoding& d, Instruction& out) {
    if (d.take("commit_group")) {
        require_operands(d, 0);
        out.run = &commit;
        return;
    }
    if (d.take("wait_group")) {
        out.detail = d.take("read");
        require_operands(d, 1);
        out.number = static_cast<std::uint32_t>(d.integer(d.operand(0)));
        out.run = &wait;
        return;
    }
    if (d.take("tensor")) take_dimensions(d, out);
    const bool hint = d.take("L2::cache_hint");
    const bool stores = d.take("bulk_group");
    if (!d.take("global") || d.take_any({"shared::cta", "shared::cluster"}).empty()) d.refuse();
    if (!stores && !d.take("mbarrier::complete_tx::bytes")) d.refuse();
    const std::size_t plain = out.detail == 0 ? 1 : 0;  // has a size as well
    require_operands(d, (stores ? 2 : 3) + plain + (hint ? 1 : 0));
    const std::string& shared = d.operand(stores ? 1 : 0);
    const std::string& global = d.operand(stores ? 0 : 1);
    shared_operand(d, shared, out);
    if (plain != 0) {
        d.address(global, out, kGlobal);
        out.rows[kSize] = d.source(d.operand(2));
    } else {
        tensor_operand(d, global, out);
    }
    if (!stores) mbarrier_operand(d, d.operand(2 + plain), out);
    out.run = stores ? &store : &load;
}

}  // namespace emulator::ptx
