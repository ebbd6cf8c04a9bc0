// mbarrier instructions, fences between proxies, elect, clusters of one block.
#include <algorithm>

#include "block.hpp"
#include "emulator.hpp"
#include "ptx_values.hpp"
#include "report.hpp"

namespace emulator::ptx {
namespace {

Flow nothing(Warp&, const Instruction&, std::uint32_t) { return Flow::kNext; }

std::uint32_t shared_address(Warp& w, const Instruction& i, std::size_t row, unsigned lane) {
    return static_cast<std::uint32_t>(w.row(i.rows[row])[lane] +
                                      static_cast<std::uint64_t>(i.offset));
}

// rows: address, count.
Flow initialise(Warp& w, const Instruction& i, std::uint32_t lanes) {
    for_lanes(lanes, [&](unsigned l) {
        const auto count = static_cast<unsigned>(w.row(i.rows[1])[l]);
        w.block->init_mbarrier(w, l, shared_address(w, i, 0, l), count, i.line);
    });
    return Flow::kNext;
}

// detail of an arrival
constexpr std::uint8_t kArrives = 1;
constexpr std::uint8_t kAnnounces = 2;
constexpr std::uint8_t kCompletes = 4;

// rows: state or none, address, count or none, bytes or none.
Flow arrive(Warp& w, const Instruction& i, std::uint32_t lanes) {
    Block& block = *w.block;
    const bool arrives = (i.detail & kArrives) != 0;
    const Knowledge knowledge = arrives ? block.released_by(w, lanes) : Knowledge{};
    for_lanes(lanes, [&](unsigned l) {
        const std::uint32_t at = shared_address(w, i, 1, l);
        MBarrier& barrier = block.mbarrier(w, l, at, i.line);
        if (i.rows[0] != kNoRow) w.row(i.rows[0])[l] = barrier.phase;
        std::int64_t bytes = 0;
        if (i.rows[3] != kNoRow) bytes = static_cast<std::uint32_t>(w.row(i.rows[3])[l]);
        if ((i.detail & kCompletes) != 0) {
            block.complete_bytes(barrier, bytes);
            return;
        }
        const auto count = i.rows[2] != kNoRow ? static_cast<unsigned>(w.row(i.rows[2])[l]) : 1u;
        block.arrive(w, l, at, arrives ? count : 0, bytes, knowledge, i.line);
    });
    return Flow::kNext;
}

// detail of a wait
constexpr std::uint8_t kParity = 1;
constexpr std::uint8_t kMaySuspend = 2;
constexpr std::uint8_t kHasTime = 4;

// rows: predicate, address, parity or state.
Flow wait(Warp& w, const Instruction& i, std::uint32_t lanes) {
    Block& block = *w.block;
    // One without a time may return at once, before the copies have landed: in this schedule every
    // other one does.
    const bool at_once = (i.detail & kHasTime) == 0 && options().schedule == 1 && !w.tried;
    std::uint32_t done = 0;
    for_lanes(lanes, [&](unsigned l) {
        const std::uint32_t at = shared_address(w, i, 1, l);
        MBarrier& barrier = block.mbarrier(w, l, at, i.line);
        const std::uint64_t given = w.row(i.rows[2])[l];
        const auto over = [&] {
            return (i.detail & kParity) != 0 ? (barrier.phase & 1) != (given & 1)
                                             : barrier.phase != given;
        };
        if (!over() && !at_once) block.deliver_bulk(at, barrier.phase);
        if (over()) done |= 1u << l;
    });
    if (done == 0 && (i.detail & kMaySuspend) != 0 && !w.poll_fails && !at_once) {
        return Flow::kWait;
    }
    w.poll_fails = false;
    w.tried = at_once && done == 0;
    for_lanes(lanes, [&](unsigned l) { w.row(i.rows[0])[l] = done >> l & 1; });
    // Lanes mostly wait for the same one, and then learn the same.
    for (std::uint32_t rest = done; rest != 0;) {
        const std::uint32_t at =
            shared_address(w, i, 1, static_cast<unsigned>(__builtin_ctz(rest)));
        std::uint32_t same = 0;
        for_lanes(rest, [&](unsigned l) {
            same |= static_cast<std::uint32_t>(shared_address(w, i, 1, l) == at) << l;
        });
        const auto first = static_cast<unsigned>(__builtin_ctz(same));
        MBarrier& barrier = block.mbarrier(w, first, at, i.line);
        block.acquire(w, same, barrier.completed);
        barrier.waited.push_back({w.index, same, now(), i.line});
        rest &= ~same;
    }
    return Flow::kNext;
}

void take_scopes(Decoding& d) {
    while (!d.take_any({"release", "acquire", "relaxed", "cta", "cluster", "shared", "shared::cta",
                        "shared::cluster"})
                .empty()) {
    }
}

void arriving(Decoding& d, Instruction& out) {
    const bool returns = (out.detail & kArrives) != 0;
    const std::size_t first = returns ? 1 : 0;
    const bool with_bytes = (out.detail & (kAnnounces | kCompletes)) != 0;
    const std::size_t operands = d.operand_count();
    if (operands < first + 1 + (with_bytes ? 1 : 0) || operands > first + 2) d.refuse();
    if (returns && d.operand(0) != "_") out.rows[0] = d.destination(d.operand(0));
    d.address(d.operand(first), out, 1);
    if (operands == first + 2) {
        out.rows[with_bytes ? 3 : 2] = d.source(d.operand(first + 1));
    }
    out.run = &arrive;
}

void waiting(Decoding& d, Instruction& out) {
    out.detail = static_cast<std::uint8_t>(out.detail | (d.take("parity") ? kParity : 0));
    take_scopes(d);
    if (!(d.take_type() == Type{'b', 64, false})) d.refuse();
    if (d.operand_count() < 3 || d.operand_count() > 4) d.refuse();
    if (d.operand_count() == 4) out.detail |= kHasTime;
    out.rows[0] = d.destination(d.operand(0));
    d.address(d.operand(1), out, 1);
    out.rows[2] = d.source(d.operand(2));
    out.run = &wait;
}

// --- elect, mapa, griddepcontrol -----------------------------------------------------------------

// rows: leader, predicate, member mask. The leader is the first lane, on which CUTLASS relies.
Flow elect(Warp& w, const Instruction& i, std::uint32_t lanes) {
    std::uint32_t members = 0;
    if (gather(w, w.row(i.rows[2]), lanes, i.line, members) == Flow::kWait) return Flow::kWait;
    const auto leader = static_cast<unsigned>(__builtin_ctz(members));
    for_lanes(lanes, [&](unsigned l) {
        if (i.rows[0] != kNoRow) w.row(i.rows[0])[l] = leader;
        w.row(i.rows[1])[l] = l == leader;
    });
    return Flow::kNext;
}

// rows: result, address, rank of the block, which is the only one of its cluster.
Flow map_address(Warp& w, const Instruction& i, std::uint32_t lanes) {
    for_lanes(lanes, [&](unsigned l) {
        if (static_cast<std::uint32_t>(w.row(i.rows[2])[l]) != 0) {
            w.block->about(w, l);
            report("out-of-bounds", "mapa at line %d to block %u of a cluster of one", i.line,
                   static_cast<unsigned>(w.row(i.rows[2])[l]));
            throw Abandoned{};
        }
        w.row(i.rows[0])[l] = w.row(i.rows[1])[l];
    });
    return Flow::kNext;
}

void fence(Decoding& d, Instruction& out) {
    if (d.take("proxy")) {
        if (d.take("tensormap::generic")) return decode_map_fence(d, out);
        if (!d.take("async")) d.refuse();
        d.take_any({"shared::cta", "shared::cluster", "global"});
        out.run = [](Warp& w, const Instruction&, std::uint32_t lanes) {
            w.block->fence_proxy(w, lanes);
            return Flow::kNext;
        };
    } else if (d.take("mbarrier_init")) {
        if (!d.take("release") || !d.take("cluster")) d.refuse();
        out.run = [](Warp& w, const Instruction&, std::uint32_t lanes) {
            w.block->fence_mbarrier_init(w, lanes);
            return Flow::kNext;
        };
    } else {
        // Memory is sequentially consistent here; fences order nothing for the checker.
        while (!d.take_any({"sc", "acq_rel", "acquire", "release", "cta", "cluster", "gpu", "sys"})
                    .empty()) {
        }
        out.run = &nothing;
    }
}

}  // namespace

bool decode_mbarrier(std::string_view opcode, Decoding& d, Instruction& out) {
    if (opcode == "fence") {
        fence(d, out);
        return true;
    }
    if (opcode != "mbarrier") return false;
    if (d.take("try_wait") || d.take("test_wait")) {
        out.detail = out.text->find("try_wait") != std::string::npos ? kMaySuspend : 0;
        waiting(d, out);
        return true;
    }
    const bool initialises = d.take("init");
    if (d.take("arrive")) out.detail |= kArrives;
    if (d.take("expect_tx")) out.detail |= kAnnounces;
    if (d.take("complete_tx")) out.detail |= kCompletes;
    take_scopes(d);
    if (!(d.take_type() == Type{'b', 64, false})) d.refuse();
    if (initialises) {
        require_operands(d, 2);
        d.address(d.operand(0), out, 0);
        out.rows[1] = d.source(d.operand(1));
        out.run = &initialise;
    } else if (out.detail != 0) {
        arriving(d, out);
    } else {
        d.refuse();
    }
    return true;
}

bool decode_cluster(std::string_view opcode, Decoding& d, Instruction& out) {
    if (opcode == "elect") {
        if (!d.take("sync")) d.refuse();
        require_operands(d, 2);
        const std::string& both = d.operand(0);
        const std::size_t bar = both.find('|');
        if (bar == both.npos) d.refuse();
        if (both.substr(0, bar) != "_") out.rows[0] = d.destination(both.substr(0, bar));
        out.rows[1] = d.destination(both.substr(bar + 1));
        out.rows[2] = d.source(d.operand(1));
        out.run = &elect;
    } else if (opcode == "mapa") {
        d.take_any({"shared::cluster", "shared"});
        d.take_type();
        plain_operands(d, out);
        require_operands(d, 3);
        out.run = &map_address;
    } else if (opcode == "setmaxnreg") {
        // How registers are shared out, which changes no value.
        if (d.take_any({"inc", "dec"}).empty() || !d.take("sync") || !d.take("aligned")) d.refuse();
        d.take_type();
        const std::int64_t registers = d.integer(d.operand(0));
        if (registers < 24 || registers > 256 || registers % 8 != 0) d.refuse();
        out.run = &nothing;
    } else if (opcode == "griddepcontrol") {
        // Grids run one after another.
        if (d.take_any({"wait", "launch_dependents"}).empty()) d.refuse();
        out.run = &nothing;
    } else {
        return false;
    }
    return true;
}

}  // namespace emulator::ptx
