// mbarriers, proxy fences and bulk copies: what they order.
//
// A bulk copy lands as late as it may, when somebody looks at the mbarrier that it completes on;
// until then its destination is marked. What it wrote is then known to those who waited for the
// phase, and to nobody else.
#include "ptx_async.hpp"

#include <algorithm>
#include <cstring>

#include "block.hpp"
#include "emulator.hpp"
#include "ptx_machine.hpp"
#include "report.hpp"

namespace emulator::ptx {
namespace {

// How often in a row every wait for an mbarrier may fail before that is a deadlock.
constexpr unsigned kMostFailedPolls = 64;

}  // namespace

void Block::wake() {
    failed_polls_ = 0;
    for (Warp& warp : warps_) {
        if (warp.at_barrier) continue;
        for (Warp::Fragment& f : warp.fragments) f.waiting = false;
    }
}

namespace {

bool waits_for_mbarrier(const Warp::Fragment& fragment, const Instruction& instruction) {
    return fragment.waiting && instruction.text->compare(0, 8, "mbarrier") == 0;
}

}  // namespace

void Block::report_mbarrier_wait(Warp& warp) {
    for (const Warp::Fragment& f : warp.fragments) {
        const Instruction& i = program_.code[f.pc];
        if (!waits_for_mbarrier(f, i)) continue;
        const auto lane = static_cast<unsigned>(__builtin_ctz(f.lanes));
        const auto at = static_cast<std::uint32_t>(warp.row(i.rows[1])[lane] +
                                                   static_cast<std::uint64_t>(i.offset));
        const MBarrier& barrier = mbarriers_.at(at);
        about(warp, lane);
        report(
            "deadlock",
            "lanes %08x of warp %u wait at line %d for the mbarrier at 0x%x, of line %d; its phase "
            "%llu lacks %u of %u arrivals and %lld bytes",
            f.lanes, warp.index, i.line, at, barrier.line,
            static_cast<unsigned long long>(barrier.phase), barrier.pending, barrier.expected,
            static_cast<long long>(barrier.bytes));
        throw Abandoned{};
    }
}

// Nothing can go on. Waits for mbarriers may return without success, so they do, for a while.
bool Block::retry_polls() {
    if (failed_polls_ >= kMostFailedPolls) return false;
    bool any = false;
    for (Warp& warp : warps_) {
        for (Warp::Fragment& f : warp.fragments) {
            if (!waits_for_mbarrier(f, program_.code[f.pc])) continue;
            f.waiting = false;
            warp.poll_fails = any = true;
        }
    }
    ++failed_polls_;
    return any;
}

// --- fences --------------------------------------------------------------------------------------

void Block::fence_proxy(Warp& warp, std::uint32_t lanes) {
    const Time t = advance_time();
    for_lanes(lanes, [&](unsigned l) { fences_[warp.thread(l)].push_back(t); });
    Knowledge fenced;
    fenced.fenced = warp.known.done;
    fenced.fenced.learn(warp.index, warp.synced);
    for_lanes(lanes, [&](unsigned l) {
        if (warp.lane_known[l]) fenced.fenced.join(warp.lane_known[l]->done);
    });
    acquire(warp, lanes, fenced);
}

void Block::fence_mbarrier_init(Warp& warp, std::uint32_t lanes) {
    const Time t = advance_time();
    for_lanes(lanes, [&](unsigned l) { init_fences_[warp.thread(l)].push_back(t); });
}

bool Block::fenced(const Warp& warp, unsigned lane, unsigned writer, Time when) const {
    if (warp.known.fenced.knows(writer, when)) return true;
    const auto& alone = warp.lane_known[lane];
    if (alone && alone->fenced.knows(writer, when)) return true;
    const std::vector<Time>& fences = fences_[writer];
    const auto first = std::upper_bound(fences.begin(), fences.end(), when);
    return first != fences.end() && ordered(warp, lane, writer, *first);
}

// --- mbarriers -----------------------------------------------------------------------------------

void Block::init_mbarrier(Warp& warp, unsigned lane, std::uint32_t at, unsigned count, int line) {
    reach(warp, lane, Space::kShared, at, 8, Access::kWrite, line);
    const auto [it, fresh] = mbarriers_.try_emplace(at);
    MBarrier& barrier = it->second;
    const unsigned agent =
        fresh ? 3 * warp_count() + static_cast<unsigned>(warpgroups_.size()) + mbarrier_agents_++
              : barrier.agent;
    barrier = MBarrier{};
    barrier.expected = barrier.pending = count;
    barrier.agent = agent;
    barrier.initialised_by = warp.thread(lane);
    barrier.initialised = now();
    barrier.line = line;
    if (count == 0 || count >= 1u << 20) {
        about(warp, lane);
        report("mbarrier", "initialised at line %d for %u arrivals", line, count);
        throw Abandoned{};
    }
}

MBarrier& Block::mbarrier(Warp& warp, unsigned lane, std::uint32_t at, int line) {
    reach(warp, lane, Space::kShared, at, 8, Access::kAtomic, line);
    const auto it = mbarriers_.find(at);
    if (it == mbarriers_.end()) {
        about(warp, lane);
        report("mbarrier", "%s at line %d of shared memory at 0x%x, where none is initialised",
               opcode_at(line), line, at);
        throw Abandoned{};
    }
    const MBarrier& barrier = it->second;
    if (!ordered(warp, lane, barrier.initialised_by, barrier.initialised)) {
        about(warp, lane);
        report("race-shared",
               "%s at line %d of the mbarrier that thread %u initialised at line %d, with nothing "
               "between that orders them",
               opcode_at(line), line, barrier.initialised_by, barrier.line);
    }
    return it->second;
}

void Block::arrive(Warp& warp, unsigned lane, std::uint32_t at, unsigned count, std::int64_t bytes,
                   const Knowledge& knowledge, int line) {
    MBarrier& barrier = mbarrier(warp, lane, at, line);
    barrier.bytes += bytes;
    failed_polls_ = 0;
    if (count == 0) return;  // announces bytes and does not arrive
    if (count > barrier.pending) {
        about(warp, lane);
        report("mbarrier", "%u arrivals at line %d, of which the phase expects %u", count, line,
               barrier.pending);
        throw Abandoned{};
    }
    barrier.pending -= count;
    barrier.arriving.join(knowledge);
    complete_bytes(barrier, 0);
}

// A wait names its phase by parity, so it must come before the next phase ends: later it would wait
// for the one after. That it came in time must follow from what those who arrived have waited for.
// Of lanes that succeed in one instruction, which CUTLASS lets one arrive for all, any will do.
void Block::check_overtaken(MBarrier& barrier) {
    const Clock& known = barrier.arriving.done;
    for (const PhaseWait& wait : barrier.waited) {
        const Warp& warp = warps_[wait.warp];
        // A product is not done before all four warps have issued it, behind their waits.
        bool ordered = known.knows(agent_of_wgmma(warp) * 32, wait.when);
        for_lanes(wait.lanes,
                  [&](unsigned l) { ordered = ordered || known.knows(warp.thread(l), wait.when); });
        if (ordered) continue;
        about(warp, static_cast<unsigned>(__builtin_ctz(wait.lanes)));
        report("mbarrier",
               "the next phase of the mbarrier of line %d may end before the wait at line %d: "
               "nothing that arrived there is ordered behind it",
               barrier.line, wait.line);
        break;
    }
    barrier.waited.clear();
}

void Block::complete_bytes(MBarrier& barrier, std::int64_t bytes) {
    barrier.bytes -= bytes;
    failed_polls_ = 0;
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    check_overtaken(barrier);
    ++barrier.phase;
    barrier.pending = barrier.expected;
    barrier.completed.join(barrier.arriving);
    barrier.completed.done.learn(barrier.agent, advance_time());
    barrier.arriving.clear();
    wake();
}

// --- bulk copies ---------------------------------------------------------------------------------

void Block::issue_bulk(Warp& warp, unsigned lane, BulkCopy copy) {
    MBarrier& barrier = mbarrier(warp, lane, copy.mbarrier, copy.line);
    const auto seen = [&](const std::vector<Time>& fences) {
        const auto first = std::upper_bound(fences.begin(), fences.end(), barrier.initialised);
        return first != fences.end() && ordered(warp, lane, barrier.initialised_by, *first);
    };
    if (!seen(fences_[barrier.initialised_by]) && !seen(init_fences_[barrier.initialised_by])) {
        about(warp, lane);
        report("proxy-fence",
               "the copy at line %d completes on an mbarrier whose initialisation at line %d no "
               "fence.mbarrier_init or fence.proxy.async came after",
               copy.line, barrier.line);
    }
    copy.thread = warp.thread(lane);
    for (const CopyPiece& piece : copy.pieces) {
        // The write may happen from now on, so it must be ordered after what others did there.
        reach_async(warp, lane, Space::kShared, piece.to, piece.bytes, Access::kWrite, copy.line,
                    barrier.agent);
        if (piece.valid > 0) {
            reach_async(warp, lane, Space::kGlobal, piece.from, piece.valid, Access::kRead,
                        copy.line, barrier.agent);
        }
        std::fill_n(in_flight_.begin() + piece.to, piece.bytes,
                    static_cast<std::uint16_t>(copy.thread + 1));
    }
    bulk_copies_.push_back(std::move(copy));
    failed_polls_ = 0;
}

void Block::deliver_bulk(std::uint32_t at, std::uint64_t phase) {
    MBarrier& barrier = mbarriers_.at(at);
    while (barrier.phase == phase) {
        auto it = std::find_if(bulk_copies_.begin(), bulk_copies_.end(),
                               [&](const BulkCopy& c) { return c.mbarrier == at; });
        if (it == bulk_copies_.end()) return;
        const BulkCopy copy = std::move(*it);
        bulk_copies_.erase(it);
        for (const CopyPiece& piece : copy.pieces) {
            unsigned char* to = shared_.data() + piece.to;
            std::memset(to, 0, piece.bytes);
            if (piece.valid > 0) {
                std::memcpy(to, reinterpret_cast<const void*>(piece.from), piece.valid);
            }
            for (unsigned i = 0; i < piece.bytes; ++i) {
                cells_[piece.to + i].written = now();
                cells_[piece.to + i].writer = static_cast<std::uint16_t>(barrier.agent * 32);
                in_flight_[piece.to + i] = 0;
            }
        }
        complete_bytes(barrier, static_cast<std::int64_t>(copy.bytes));
    }
}

void Block::store_bulk(Warp& warp, unsigned lane, const CopyPiece& piece, int line) {
    if (piece.valid == 0) return;
    const unsigned char* from = reach_async(warp, lane, Space::kShared, piece.to, piece.valid,
                                            Access::kRead, line, agent_of_store_reads(warp));
    unsigned char* to = reach_async(warp, lane, Space::kGlobal, piece.from, piece.valid,
                                    Access::kWrite, line, agent_of_store_writes(warp));
    std::memcpy(to, from, piece.valid);
}

// --- clusters of one block -----------------------------------------------------------------------

Flow Block::cluster_barrier(Warp& warp, std::uint32_t lanes, bool arrive, int line) {
    if (lanes != warp.alive()) return Flow::kWait;
    if (arrive) {
        const auto count = static_cast<unsigned>(__builtin_popcount(lanes));
        if (count > cluster_.pending) {
            about(warp, static_cast<unsigned>(__builtin_ctz(lanes)));
            report("divergent-barrier", "barrier.cluster.arrive at line %d without a wait", line);
            throw Abandoned{};
        }
        warp.cluster_phase = cluster_.phase;
        cluster_.pending -= count;
        cluster_.arriving.join(released_by(warp, lanes));
        complete_bytes(cluster_, 0);
        return Flow::kNext;
    }
    if (cluster_.phase == warp.cluster_phase) return Flow::kWait;
    acquire(warp, lanes, cluster_.completed);
    for (auto& lane : warp.lane_known) lane.reset();
    return Flow::kNext;
}

}  // namespace emulator::ptx
