// Branches, barriers, and what lanes of a warp do together: shuffles, votes, reductions.
#include <algorithm>

#include "emulator.hpp"
#include "ptx_values.hpp"
#include "report.hpp"

namespace emulator::ptx {
namespace {

Flow branch(Warp&, const Instruction&, std::uint32_t) { return Flow::kBranch; }
Flow leave(Warp&, const Instruction&, std::uint32_t) { return Flow::kExit; }
Flow nothing(Warp&, const Instruction&, std::uint32_t) { return Flow::kNext; }

Flow trap(Warp& w, const Instruction& i, std::uint32_t lanes) {
    w.block->about(w, static_cast<unsigned>(__builtin_ctz(lanes)));
    report("trap", "at line %d", i.line);
    throw Abandoned{};
}

// rows: id, threads or none; detail 1: arrives without waiting.
Flow barrier(Warp& w, const Instruction& i, std::uint32_t lanes) {
    const auto first = static_cast<unsigned>(__builtin_ctz(lanes));
    const auto id = static_cast<unsigned>(w.row(i.rows[0])[first]);
    unsigned threads = 0;
    if (i.rows[1] != kNoRow) threads = static_cast<unsigned>(w.row(i.rows[1])[first]);
    if (id > 15 || threads % 32 != 0) {
        w.block->about(w, first);
        report("launch", "barrier %u for %u threads at line %d", id, threads, i.line);
        throw Abandoned{};
    }
    return w.block->barrier(w, lanes, id, threads, i.detail == 0, i.line);
}

// bar.red. rows: result, id, predicate. detail: a(nd), o(r), p(opc).
Flow reducing_barrier(Warp& w, const Instruction& i, std::uint32_t lanes) {
    const auto id = static_cast<unsigned>(w.row(i.rows[1])[__builtin_ctz(lanes)]);
    std::uint32_t yes = 0;
    for_lanes(lanes, [&](unsigned l) {
        yes |= static_cast<std::uint32_t>((w.row(i.rows[2])[l] != 0) != (i.number != 0)) << l;
    });
    if (w.block->barrier(w, lanes, id % 16, 0, true, i.line, yes) == Flow::kWait) {
        return Flow::kWait;
    }
    const std::uint64_t result = i.detail == 'a'   ? w.barrier_yes == w.barrier_threads
                                 : i.detail == 'o' ? w.barrier_yes != 0
                                                   : w.barrier_yes;
    for_lanes(lanes, [&](unsigned l) { w.row(i.rows[0])[l] = result; });
    return Flow::kNext;
}

Flow sync_warp(Warp& w, const Instruction& i, std::uint32_t lanes) {
    std::uint32_t members = 0;
    if (gather(w, w.row(i.rows[0]), lanes, i.line, members) == Flow::kWait) return Flow::kWait;
    w.block->sync_warp(w, members);
    return Flow::kNext;
}

// rows: d, p or none, a, b, c, member mask. detail: the mode.
Flow shuffle(Warp& w, const Instruction& i, std::uint32_t lanes) {
    std::uint32_t members = 0;
    if (gather(w, w.row(i.rows[5]), lanes, i.line, members) == Flow::kWait) return Flow::kWait;
    std::uint64_t from[32];
    std::copy_n(w.row(i.rows[2]), 32, from);
    std::uint64_t result[32];
    bool valid[32];
    for_lanes(lanes, [&](unsigned l) {
        const auto b = static_cast<int>(w.row(i.rows[3])[l] & 31);
        const auto c = static_cast<unsigned>(w.row(i.rows[4])[l]);
        const unsigned segment = c >> 8 & 31;
        const auto lane = static_cast<int>(l);
        const auto most = static_cast<int>((l & segment) | (c & 31 & ~segment));
        int source = lane;
        switch (i.detail) {
            case 'u':
                source = lane - b;
                break;
            case 'd':
                source = lane + b;
                break;
            case 'b':
                source = lane ^ b;
                break;
            default:
                source = static_cast<int>(l & segment) | (b & static_cast<int>(~segment & 31));
        }
        valid[l] = i.detail == 'u' ? source >= most : source <= most;
        if (!valid[l]) source = lane;
        if ((members >> source & 1) == 0) {
            w.block->about(w, l);
            report("shuffle", "reads lane %d, which is not in mask %08x, at line %d", source,
                   members, i.line);
            source = lane;
        }
        result[l] = from[source] & 0xffffffffu;
    });
    for_lanes(lanes, [&](unsigned l) {
        w.row(i.rows[0])[l] = result[l];
        if (i.rows[1] != kNoRow) w.row(i.rows[1])[l] = valid[l];
    });
    return Flow::kNext;
}

// rows: d, predicate, member mask. detail: b(allot), a(ll), y (any), u(ni).
Flow vote(Warp& w, const Instruction& i, std::uint32_t lanes) {
    std::uint32_t members = 0;
    if (gather(w, w.row(i.rows[2]), lanes, i.line, members) == Flow::kWait) return Flow::kWait;
    std::uint32_t yes = 0;
    for_lanes(members, [&](unsigned l) {
        yes |= static_cast<std::uint32_t>((w.row(i.rows[1])[l] != 0) != (i.number != 0)) << l;
    });
    const std::uint64_t result = i.detail == 'b'   ? yes
                                 : i.detail == 'a' ? yes == members
                                 : i.detail == 'y' ? yes != 0
                                                   : yes == 0 || yes == members;
    for_lanes(lanes, [&](unsigned l) { w.row(i.rows[0])[l] = result; });
    return Flow::kNext;
}

template <class T, char kWhat>
Flow reduce(Warp& w, const Instruction& i, std::uint32_t lanes) {
    std::uint32_t members = 0;
    if (gather(w, w.row(i.rows[2]), lanes, i.line, members) == Flow::kWait) return Flow::kWait;
    const std::uint64_t* a = w.row(i.rows[1]);
    T result = get<T>(a[__builtin_ctz(members)]);
    for_lanes(members & (members - 1), [&](unsigned l) {
        const T x = get<T>(a[l]);
        if constexpr (kWhat == '+')
            result =
                static_cast<T>(static_cast<std::uint32_t>(result) + static_cast<std::uint32_t>(x));
        else if constexpr (kWhat == '<')
            result = std::min(result, x);
        else if constexpr (kWhat == '>')
            result = std::max(result, x);
        else if constexpr (kWhat == '&')
            result &= x;
        else if constexpr (kWhat == '|')
            result |= x;
        else
            result ^= x;
    });
    for_lanes(lanes, [&](unsigned l) { w.row(i.rows[0])[l] = bits_of(result); });
    return Flow::kNext;
}

Flow active_mask(Warp& w, const Instruction& i, std::uint32_t lanes) {
    for_lanes(lanes, [&](unsigned l) { w.row(i.rows[0])[l] = lanes; });
    return Flow::kNext;
}

void block_barrier(Decoding& d, Instruction& out) {
    if (d.take("warp")) {
        if (!d.take("sync")) d.refuse();
        require_operands(d, 1);
        out.rows[0] = d.source(d.operand(0));
        out.run = &sync_warp;
        return;
    }
    if (d.take("cluster")) {
        const bool arrives = d.take("arrive");
        if (!arrives && !d.take("wait")) d.refuse();
        while (!d.take_any({"release", "relaxed", "acquire", "aligned"}).empty()) {
        }
        require_operands(d, 0);
        out.detail = arrives;
        out.run = [](Warp& w, const Instruction& i, std::uint32_t lanes) {
            return w.block->cluster_barrier(w, lanes, i.detail != 0, i.line);
        };
        return;
    }
    d.take("cta");
    if (d.take("red")) {
        const std::string what = d.take_any({"and", "or", "popc"});
        d.take("aligned");
        d.take_type();
        require_operands(d, 3);
        if (what.empty()) d.refuse();
        const bool negated = d.operand(2)[0] == '!';
        out.rows[0] = d.destination(d.operand(0));
        out.rows[1] = d.source(d.operand(1));
        out.rows[2] = d.source(d.operand(2).substr(negated ? 1 : 0));
        out.number = negated;
        out.detail = static_cast<std::uint8_t>(what[0]);
        out.run = &reducing_barrier;
        return;
    }
    const bool arrive = d.take("arrive");
    if (!arrive && !d.take("sync")) d.refuse();
    d.take("aligned");
    if (d.operand_count() < 1 || d.operand_count() > 2) d.refuse();
    out.rows[0] = d.source(d.operand(0));
    out.rows[1] = d.operand_count() == 2 ? d.source(d.operand(1)) : kNoRow;
    out.detail = arrive;
    out.run = &barrier;
}

void shuffling(Decoding& d, Instruction& out) {
    if (!d.take("sync")) d.refuse();
    const std::string mode = d.take_any({"up", "down", "bfly", "idx"});
    if (mode.empty() || d.take_type().bits != 32) d.refuse();
    require_operands(d, 5);
    const std::string& both = d.operand(0);
    const std::size_t bar = both.find('|');
    out.rows[0] = d.destination(both.substr(0, bar));
    out.rows[1] = bar == both.npos ? kNoRow : d.destination(both.substr(bar + 1));
    for (std::size_t n = 1; n < 5; ++n) out.rows[1 + n] = d.source(d.operand(n));
    out.detail = static_cast<std::uint8_t>(mode[0]);
    out.run = &shuffle;
}

void voting(Decoding& d, Instruction& out) {
    if (!d.take("sync")) d.refuse();
    const std::string mode = d.take_any({"ballot", "all", "any", "uni"});
    if (mode.empty()) d.refuse();
    d.take_type();
    require_operands(d, 3);
    const bool negated = d.operand(1)[0] == '!';
    out.rows[0] = d.destination(d.operand(0));
    out.rows[1] = d.source(d.operand(1).substr(negated ? 1 : 0));
    out.rows[2] = d.source(d.operand(2));
    out.number = negated;
    out.detail = static_cast<std::uint8_t>(mode == "any" ? 'y' : mode[0]);
    out.run = &vote;
}

void reduction(Decoding& d, Instruction& out) {
    if (!d.take("sync")) d.refuse();
    const std::string what = d.take_any({"add", "min", "max", "and", "or", "xor"});
    const Type type = d.take_type();
    if (what.empty() || type.bits != 32) d.refuse();
    plain_operands(d, out);
    require_operands(d, 3);
    out.run = with_integer(d, type, [&]<class T>() -> Handler {
        return what == "add"   ? &reduce<T, '+'>
               : what == "min" ? &reduce<T, '<'>
               : what == "max" ? &reduce<T, '>'>
               : what == "and" ? &reduce<T, '&'>
               : what == "or"  ? &reduce<T, '|'>
                               : &reduce<T, '^'>;
    });
}

}  // namespace

bool decode_warp(std::string_view opcode, Decoding& d, Instruction& out) {
    if (opcode == "bra") {
        d.take("uni");
        require_operands(d, 1);
        out.target = d.label(d.operand(0));
        out.run = &branch;
    } else if (opcode == "ret" || opcode == "exit") {
        d.take("uni");
        out.run = &leave;
    } else if (opcode == "trap") {
        out.run = &trap;
    } else if (opcode == "nanosleep") {
        d.take_type();
        out.run = &nothing;
    } else if (opcode == "bar" || opcode == "barrier") {
        block_barrier(d, out);
    } else if (opcode == "shfl") {
        shuffling(d, out);
    } else if (opcode == "vote") {
        voting(d, out);
    } else if (opcode == "redux") {
        reduction(d, out);
    } else if (opcode == "activemask") {
        d.take_type();
        require_operands(d, 1);
        out.rows[0] = d.destination(d.operand(0));
        out.run = &active_mask;
    } else {
        return false;
    }
    return true;
}

}  // namespace emulator::ptx
