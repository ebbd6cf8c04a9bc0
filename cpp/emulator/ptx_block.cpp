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
    warp.known.clear();
    for (auto& lane : warp.lane_known) lane.reset();
    for (BulkStores& stores : warp.stores) stores = BulkStores{};
    warp.wgmma = WgmmaState{};
    warp.wgmma.in_use.assign(program_.rows, 0);
    warp.cluster_phase = 0;
    warp.poll_fails = warp.tried = false;
    warp.fragments.assign(1, {0, warp.present, false});
    std::fill(warp.local.begin(), warp.local.end(), static_cast<unsigned char>(0xff));
    warp.maps_seen.clear();
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
    mbarriers_.clear();
    mbarrier_agents_ = 1;  // the first is the cluster's
    bulk_copies_.clear();
    warpgroups_.assign((warps_.size() + 3) / 4, Warpgroup{});
    fences_.assign(threads_, {});
    init_fences_.assign(threads_, {});
    maps_.clear();
    cluster_ = MBarrier{};
    cluster_.expected = cluster_.pending = threads_;
    cluster_.agent = 3 * warp_count() + static_cast<unsigned>(warpgroups_.size());
    failed_polls_ = 0;
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
            if (!progress && !retry_polls()) report_stuck();
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
        if (warp.wgmma.operations != 0) check_accumulators(warp, i, lanes);
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
        unsigned stores = warp.stores[l].open;
        for (const BulkStores::Group& group : warp.stores[l].reading) stores += group.stores;
        if (stores > 0) {
            about(warp, l);
            report("async-copy", "returned with bulk stores that may still read shared memory");
        }
    });
    if (warp.wgmma.operations != 0) {
        about(warp, static_cast<unsigned>(__builtin_ctz(lanes)));
        report("wgmma", "returned with %u operations that nothing waited for",
               warp.wgmma.operations);
    }
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

// No warp can go on: says why, as precisely as it can.
void Block::report_stuck() {
    for (Warp& warp : warps_) report_mbarrier_wait(warp);
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

}  // namespace emulator::ptx
