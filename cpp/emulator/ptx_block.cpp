// Execution order: fragments of warps, barriers, what happens when nothing can go on.
#include <algorithm>

#include "block.hpp"
#include "emulator.hpp"
#include "ptx_machine.hpp"
#include "report.hpp"

namespace emulator::ptx {
namespace {

// Instructions that one warp may execute before others get a turn, and in one launch of a block
// before it is given up: a loop that waits for what never comes.
constexpr int kTurn = 1 << 14;
constexpr std::uint64_t kMostInstructions = std::uint64_t{1} << 31;

std::uint64_t special_value(Special s, const Launch& launch, const Warp& warp, unsigned lane,
                            uint3 index) {
    const dim3& block = launch.block;
    const dim3& grid = launch.grid;
    const unsigned thread = warp.thread(lane);
    const std::uint32_t bit = 1u << lane;
    switch (s) {
        case Special::kTidX:
            return thread % block.x;
        case Special::kTidY:
            return thread / block.x % block.y;
        case Special::kTidZ:
            return thread / (block.x * block.y);
        case Special::kNtidX:
            return block.x;
        case Special::kNtidY:
            return block.y;
        case Special::kNtidZ:
            return block.z;
        case Special::kCtaidX:
            return index.x;
        case Special::kCtaidY:
            return index.y;
        case Special::kCtaidZ:
            return index.z;
        case Special::kNctaidX:
            return grid.x;
        case Special::kNctaidY:
            return grid.y;
        case Special::kNctaidZ:
            return grid.z;
        case Special::kLane:
            return lane;
        case Special::kWarp:
            return warp.index;
        case Special::kWarps:
            return (block.x * block.y * block.z + 31) / 32;
        case Special::kMaskEq:
            return bit;
        case Special::kMaskLt:
            return bit - 1;
        case Special::kMaskLe:
            return bit | (bit - 1);
        case Special::kMaskGt:
            return ~(bit | (bit - 1));
        case Special::kMaskGe:
            return ~(bit - 1);
        case Special::kDynamicShared:
            return launch.dynamic_shared;
        case Special::kZero:
            return 0;
    }
    return 0;
}

}  // namespace

Block::Block(const Launch& launch)
    : launch_(launch),
      program_(*launch.program),
      threads_(launch.block.x * launch.block.y * launch.block.z),
      warps_((threads_ + 31) / 32),
      random_(options().schedule) {
    const std::size_t shared = program_.dynamic_offset + launch.dynamic_shared;
    shared_.resize(shared);
    cells_.resize(shared);
    in_flight_.resize(shared);
    for (unsigned w = 0; w < warps_.size(); ++w) {
        Warp& warp = warps_[w];
        warp.block = this;
        warp.index = w;
        const unsigned lanes = std::min(32u, threads_ - w * 32);
        warp.present = lanes == 32 ? kAllLanes : (1u << lanes) - 1;
        warp.rows.assign(program_.rows * 32, 0);
        for (const auto& [row, value] : program_.constants) {
            std::fill_n(warp.row(row), 32, value);
        }
        warp.local.resize(program_.kernel->local_bytes * 32);
    }
}

void Block::start(Warp& warp, uint3 index) {
    warp.exited = 0;
    warp.at_barrier = warp.passed_barrier = false;
    warp.synced = kNever;
    warp.pair_synced.clear();
    warp.clock.assign(warps_.size(), started_);
    warp.fragments.assign(1, {0, warp.present, false});
    std::fill(warp.local.begin(), warp.local.end(), static_cast<unsigned char>(0xff));
    for (unsigned l = 0; l < 32; ++l) {
        warp.open[l].clear();
        warp.groups[l].clear();
    }
    for (const auto& [row, special] : program_.specials) {
        for (unsigned l = 0; l < 32; ++l) {
            warp.row(row)[l] = special_value(special, launch_, warp, l, index);
        }
    }
}

bool Block::run(uint3 index) {
    index_ = index;
    started_ = advance_time();
    exited_warps_ = 0;
    std::fill(shared_.begin(), shared_.end(), static_cast<unsigned char>(0xff));
    std::fill(in_flight_.begin(), in_flight_.end(), std::uint16_t{0});
    std::fill(cells_.begin(), cells_.end(), Cell{});
    for (const auto& [offset, bytes] : program_.shared) {
        for (std::size_t i = 0; i < bytes; ++i) cells_[offset + i].allocated = true;
    }
    for (std::size_t i = program_.dynamic_offset; i < cells_.size(); ++i) {
        cells_[i].allocated = true;
    }
    for (Barrier& b : barriers_) b = Barrier{};
    for (Warp& warp : warps_) start(warp, index);

    std::vector<unsigned> order(warps_.size());
    for (unsigned w = 0; w < order.size(); ++w) order[w] = w;
    if (options().schedule == 1) std::reverse(order.begin(), order.end());
    std::uint64_t executed = 0;
    try {
        while (exited_warps_ < warps_.size()) {
            if (options().schedule > 1) std::shuffle(order.begin(), order.end(), random_);
            bool progress = false;
            for (const unsigned w : order) {
                int turn = kTurn;
                while (turn > 0 && warps_[w].alive() != 0 && step(warps_[w], turn)) {
                    progress = true;
                }
                executed += static_cast<std::uint64_t>(kTurn - turn);
            }
            if (!progress) report_stuck();
            if (executed > kMostInstructions) {
                about(warps_[0], 0);
                report("deadlock", "the block executes more than %llu instructions",
                       static_cast<unsigned long long>(kMostInstructions));
                throw Abandoned{};
            }
        }
    } catch (const Abandoned&) {
        return false;
    }
    return true;
}

// Runs the fragment that is furthest behind until it waits, meets others or its turn is over.
bool Block::step(Warp& warp, int& turn) {
    std::size_t at = 0;
    while (at < warp.fragments.size() && warp.fragments[at].waiting) ++at;
    if (at == warp.fragments.size()) return false;
    while (turn-- > 0) {
        Warp::Fragment& fragment = warp.fragments[at];
        const Instruction& i = program_.code[fragment.pc];
        std::uint32_t lanes = fragment.lanes;
        if (i.guard != kNoRow) {
            const std::uint64_t* guard = warp.row(i.guard);
            std::uint32_t holds = 0;
            for (unsigned l = 0; l < 32; ++l) holds |= static_cast<std::uint32_t>(guard[l]) << l;
            lanes &= i.guard_negated ? ~holds : holds;
        }
        warp.here = fragment.lanes;
        program_.reached[fragment.pc] |= lanes != 0;
        const Flow flow = lanes == 0 ? Flow::kNext : i.run(warp, i, lanes);
        if (flow == Flow::kWait) {
            fragment.waiting = true;
            return true;
        }
        if (flow == Flow::kExit) exit_lanes(warp, lanes);
        const std::uint32_t leave = flow == Flow::kNext ? 0 : lanes;
        const bool alone = warp.fragments.size() == 1;
        if (alone && (leave == 0 || (leave == fragment.lanes && flow == Flow::kBranch))) {
            fragment.pc = leave == 0 ? fragment.pc + 1 : i.target;
            continue;
        }
        const Warp::Fragment left = fragment;
        warp.fragments.erase(warp.fragments.begin() + static_cast<std::ptrdiff_t>(at));
        if (left.lanes != leave) place(warp, left.pc + 1, left.lanes & ~leave);
        if (flow == Flow::kBranch) place(warp, i.target, leave);
        return true;
    }
    return true;
}

void Block::place(Warp& warp, std::uint32_t pc, std::uint32_t lanes) {
    std::size_t at = 0;
    while (at < warp.fragments.size() && warp.fragments[at].pc < pc) ++at;
    if (at < warp.fragments.size() && warp.fragments[at].pc == pc) {
        warp.fragments[at].lanes |= lanes;
        warp.fragments[at].waiting = false;
        return;
    }
    warp.fragments.insert(warp.fragments.begin() + static_cast<std::ptrdiff_t>(at),
                          {pc, lanes, false});
}

void Block::about(const Warp& warp, unsigned lane) const {
    ThreadView& view = current_thread();
    const unsigned thread = warp.thread(lane);
    const dim3& dim = launch_.block;
    view.block = index_;
    view.linear = thread;
    view.thread = {thread % dim.x, thread / dim.x % dim.y, thread / (dim.x * dim.y)};
}

void Block::exit_lanes(Warp& warp, std::uint32_t lanes) {
    for_lanes(lanes, [&](unsigned l) {
        std::size_t copies = warp.open[l].size();
        for (const auto& group : warp.groups[l]) copies += group.size();
        if (copies > 0) {
            about(warp, l);
            report("async-copy", "returned with %zu cp.async that nothing waited for", copies);
        }
    });
    warp.exited |= lanes;
    for (Warp::Fragment& f : warp.fragments) f.waiting = f.waiting && warp.at_barrier;
    if (warp.alive() != 0) return;
    ++exited_warps_;
    Barrier& b = barriers_[0];
    if (b.arrived > 0 && b.whole_block && b.arrived + exited_warps_ == warps_.size()) {
        about(warp, 0);
        report("barrier-after-exit", "the last of %u warps to return; %u wait at line %d",
               exited_warps_, b.arrived, b.line);
        complete(b);
    }
}

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
    b.clock.resize(all, kNever);
    for (unsigned w = 0; w < all; ++w) b.clock[w] = std::max(b.clock[w], warp.clock[w]);
    b.clock[warp.index] = advance_time();
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
        warp.clock = barrier.clock;
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
    if (lanes == warp.present) {
        warp.synced = t;
        return;
    }
    warp.pair_synced.resize(32 * 32, kNever);
    for_lanes(lanes, [&](unsigned a) {
        for_lanes(lanes, [&](unsigned b) { warp.pair_synced[a * 32 + b] = t; });
    });
}

bool Block::ordered(unsigned thread, unsigned other, Time when) const {
    if (thread == other) return true;
    const Warp& warp = warps_[thread / 32];
    if (when < warp.clock[other / 32]) return true;
    if (thread / 32 != other / 32) return false;
    if (when < warp.synced) return true;
    return !warp.pair_synced.empty() && when < warp.pair_synced[other % 32 * 32 + thread % 32];
}

// No warp can go on: says why, as precisely as it can.
void Block::report_stuck() {
    for (const Warp& warp : warps_) {
        if (warp.alive() == 0 || warp.at_barrier || warp.fragments.empty()) continue;
        const Warp::Fragment& f = warp.fragments.front();
        const Instruction& i = program_.code[f.pc];
        about(warp, static_cast<unsigned>(__builtin_ctz(f.lanes)));
        const bool barrier =
            i.text->compare(0, 3, "bar") == 0 && i.text->find("warp") == i.text->npos;
        report(barrier ? "divergent-barrier" : "warp-diverged",
               "lanes %08x of %08x wait at line %d, %s, for others that cannot come", f.lanes,
               warp.alive(), i.line, i.text->c_str());
        throw Abandoned{};
    }
    const Warp* waiting = nullptr;
    for (const Warp& warp : warps_) {
        if (warp.alive() != 0) waiting = &warp;
    }
    about(*waiting, 0);
    report("deadlock", "%u of %zu warps have returned, the others wait at barriers, one at line %d",
           exited_warps_, warps_.size(), program_.code[waiting->fragments.front().pc].line);
    throw Abandoned{};
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
