// What lanes and warps wait for together, and what they then know of each other.
#include <algorithm>

#include "block.hpp"
#include "emulator.hpp"
#include "ptx_machine.hpp"
#include "report.hpp"

namespace emulator::ptx {

Flow Block::barrier(Warp& warp, std::uint32_t lanes, unsigned id, unsigned threads, bool wait,
                    int line, std::uint32_t yes) {
    if (warp.passed_barrier) {
        warp.passed_barrier = false;
        return Flow::kNext;
    }
    if (lanes != warp.alive()) return Flow::kWait;
    Barrier& b = barriers_[id];
    const auto lane = static_cast<unsigned>(__builtin_ctz(lanes));
    const bool whole_block = threads == 0;
    if (whole_block && (exited_warps_ > 0 || warp.exited != 0)) {
        about(warp, lane);
        report("barrier-after-exit", "the barrier at line %d, after threads have returned", line);
    }
    if (whole_block && b.arrived > 0 && b.line != line) {
        about(warp, lane);
        report("divergent-barrier", "at line %d while %u warps wait at line %d", line, b.arrived,
               b.line);
    }
    const auto all = static_cast<unsigned>(warps_.size());
    b.expected = whole_block ? all - exited_warps_ : (threads + 31) / 32;
    b.line = line;
    b.whole_block = whole_block;
    b.knowledge.join(released_by(warp, lanes));
    failed_polls_ = 0;
    ++b.arrived;
    b.threads += static_cast<unsigned>(__builtin_popcount(lanes));
    b.yes += static_cast<unsigned>(__builtin_popcount(yes));
    if (wait) {
        b.waiting |= 1u << warp.index;
        warp.at_barrier = true;
    }
    if (b.arrived >= b.expected) complete(b);
    if (!wait) return Flow::kNext;
    if (!warp.passed_barrier) return Flow::kWait;
    warp.passed_barrier = false;
    return Flow::kNext;
}

void Block::complete(Barrier& barrier) {
    ++counters().barriers;
    for (std::uint32_t rest = barrier.waiting; rest != 0; rest &= rest - 1) {
        Warp& warp = warps_[static_cast<unsigned>(__builtin_ctz(rest))];
        acquire(warp, warp.alive(), barrier.knowledge);
        for (auto& lane : warp.lane_known) lane.reset();  // which the warp itself has released
        warp.at_barrier = false;
        warp.passed_barrier = true;
        warp.barrier_threads = barrier.threads;
        warp.barrier_yes = barrier.yes;
        for (Warp::Fragment& f : warp.fragments) f.waiting = false;
    }
    barrier = Barrier{};
}

void Block::sync_warp(Warp& warp, std::uint32_t lanes) {
    const Time t = advance_time();
    Knowledge together;
    for_lanes(lanes, [&](unsigned l) {
        if (warp.lane_known[l]) together.join(*warp.lane_known[l]);
    });
    acquire(warp, lanes, together);
    if (lanes == warp.present) {
        warp.synced = t;
        for (auto& lane : warp.lane_known) lane.reset();  // all of it is in warp.known
        return;
    }
    warp.pair_synced.resize(32 * 32, kNever);
    for_lanes(lanes, [&](unsigned a) {
        for_lanes(lanes, [&](unsigned b) { warp.pair_synced[a * 32 + b] = t; });
    });
}

Knowledge Block::released_by(Warp& warp, std::uint32_t lanes) {
    Knowledge knowledge = warp.known;
    for_lanes(lanes, [&](unsigned l) {
        if (warp.lane_known[l]) knowledge.join(*warp.lane_known[l]);
    });
    const Time t = advance_time();
    if (lanes == warp.alive()) {
        knowledge.done.learn(warp.index, t);
    } else {
        // Of the other lanes, what they did before the last bar.warp.sync.
        knowledge.done.learn(warp.index, warp.synced);
        for_lanes(lanes, [&](unsigned l) { knowledge.done.learn_thread(warp.thread(l), t); });
    }
    return knowledge;
}

void Block::acquire(Warp& warp, std::uint32_t lanes, const Knowledge& knowledge) {
    if (lanes == warp.alive()) {
        warp.known.join(knowledge);
        return;
    }
    for_lanes(lanes, [&](unsigned l) {
        auto& lane = warp.lane_known[l];
        if (!lane) lane = std::make_unique<Knowledge>();
        lane->join(knowledge);
    });
}

bool Block::ordered(const Warp& warp, unsigned lane, unsigned other, Time when) const {
    const unsigned thread = warp.thread(lane);
    if (thread == other || warp.known.done.knows(other, when)) return true;
    const auto& alone = warp.lane_known[lane];
    if (alone && alone->done.knows(other, when)) return true;
    if (thread / 32 != other / 32) return false;
    if (when < warp.synced) return true;
    return !warp.pair_synced.empty() && when < warp.pair_synced[other % 32 * 32 + lane];
}

Flow gather(Warp& warp, const std::uint64_t* masks, std::uint32_t lanes, int line,
            std::uint32_t& members) {
    const auto first = static_cast<unsigned>(__builtin_ctz(lanes));
    const Block& block = *warp.block;
    // Lanes of another mask are another group, which executes by itself.
    const auto mask = static_cast<std::uint32_t>(masks[first]) & warp.present;
    for_lanes(lanes, [&](unsigned l) {
        const auto own = static_cast<std::uint32_t>(masks[l]) & warp.present;
        if ((own >> l & 1) == 0) {
            block.about(warp, l);
            report("warp-mask", "lane %u is not in its own mask %08x at line %d", l, own, line);
            throw Abandoned{};
        }
        if (own != mask && (own & mask) != 0) {
            block.about(warp, l);
            report("warp-mask", "masks %08x and %08x overlap at line %d", mask, own, line);
            throw Abandoned{};
        }
    });
    if ((mask & warp.exited) != 0) {
        block.about(warp, first);
        report("warp-mask", "mask %08x names lanes %08x that have returned, at line %d", mask,
               mask & warp.exited, line);
    }
    members = mask & ~warp.exited;
    if ((members & ~lanes) != 0) return Flow::kWait;
    ++counters().warp_operations;
    return Flow::kNext;
}

}  // namespace emulator::ptx
