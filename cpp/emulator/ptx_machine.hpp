// One block of a grid in execution, warp by warp.
//
// A warp is a set of fragments: lanes that stand at the same instruction. The fragment that is
// furthest behind runs first, so lanes that diverged meet again where the compiler lets them. What
// orders memory accesses is kept apart from that order of execution: barriers and bar.warp.sync,
// never the luck of lockstep.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "ptx_async.hpp"
#include "ptx_clock.hpp"
#include "ptx_program.hpp"
#include "shadow.hpp"

namespace emulator::ptx {

// Generic addresses of what is not global memory. No host address looks like these.
inline constexpr std::uint64_t kSharedWindow = std::uint64_t{1} << 60;
inline constexpr std::uint64_t kLocalWindow = std::uint64_t{2} << 60;
inline constexpr std::uint64_t kParamWindow = std::uint64_t{3} << 60;
inline constexpr std::uint64_t kWindowMask = std::uint64_t{7} << 60;

inline constexpr std::uint32_t kAllLanes = 0xffffffffu;

// Thrown after a report to give up the launch.
struct Abandoned {};

struct Launch {
    Program* program;
    dim3 grid;
    dim3 block;
    std::size_t dynamic_shared;
    std::vector<unsigned char> params;
};

// A cp.async that has been issued and not delivered.
struct PendingCopy {
    std::uint32_t to;  // in shared memory
    std::uint64_t from;
    std::uint8_t bytes;
    std::uint8_t from_bytes;  // the rest is zeros
    int line;
};

class Block;

class Warp {
  public:
    struct Fragment {
        std::uint32_t pc;
        std::uint32_t lanes;
        bool waiting;
    };

    std::uint64_t* row(Row r) { return rows.data() + std::size_t{r} * 32; }
    unsigned thread(unsigned lane) const { return index * 32 + lane; }
    // Lanes that exist and have not returned.
    std::uint32_t alive() const { return present & ~exited; }

    Block* block = nullptr;
    unsigned index = 0;
    std::uint32_t present = 0;
    std::uint32_t exited = 0;
    std::vector<std::uint64_t> rows;
    std::vector<Fragment> fragments;  // by ascending pc
    std::uint32_t here = 0;           // lanes of the fragment in execution, predicate or not
    bool at_barrier = false;          // arrived, and not yet let through
    bool passed_barrier = false;      // let through: the next execution of it completes
    // Threads at the barrier just passed, and those of them whose predicate held (bar.red).
    unsigned barrier_threads = 0;
    unsigned barrier_yes = 0;
    Time synced = kNever;           // the last bar.warp.sync of all lanes
    std::vector<Time> pair_synced;  // of two lanes, where it was for a part of the warp; 32 x 32
    Knowledge known;                // what all lanes know of others
    std::unique_ptr<Knowledge> lane_known[32];  // what one lane alone knows beyond that
    std::vector<unsigned char> local;
    std::vector<PendingCopy> open[32];  // cp.async since the last commit
    std::deque<std::vector<PendingCopy>> groups[32];
    BulkStores stores[32];
    WgmmaState wgmma;
    std::uint64_t cluster_phase = 0;  // of barrier.cluster, when it arrived
    bool poll_fails = false;          // its mbarrier wait is to return without success
    bool tried = false;               // its last mbarrier wait did, as it may at any time
    // Which publication of a tensor map each lane has fenced for, by the map's address.
    std::map<std::uint64_t, std::array<Time, 32>> maps_seen;
};

class Block {
  public:
    explicit Block(const Launch& launch);

    // False, with a report made, when the block was abandoned.
    bool run(uint3 index);

    // The memory behind an address, checked for bounds and alignment, and recorded as accessed.
    unsigned char* reach(Warp& warp, unsigned lane, Space space, std::uint64_t address,
                         std::size_t bytes, Access kind, int line);
    // Counts sectors or wavefronts of one warp-wide access.
    void count(Space space, const std::uint64_t* addresses, std::uint32_t lanes, std::size_t bytes);

    // bar.sync, bar.arrive. `threads` of 0: all of the block.
    Flow barrier(Warp& warp, std::uint32_t lanes, unsigned id, unsigned threads, bool wait,
                 int line, std::uint32_t yes = 0);
    void sync_warp(Warp& warp, std::uint32_t lanes);
    // What others learn from lanes that release, and what lanes learn that acquire it.
    Knowledge released_by(Warp& warp, std::uint32_t lanes);
    void acquire(Warp& warp, std::uint32_t lanes, const Knowledge& knowledge);
    // Whether what thread `other` (or another agent) did at `when` is ordered before what this
    // thread does now; and whether the asynchronous proxy sees it.
    bool ordered(const Warp& warp, unsigned lane, unsigned other, Time when) const;
    bool fenced(const Warp& warp, unsigned lane, unsigned writer, Time when) const;

    // --- sm_90, ptx_async.cpp
    void fence_proxy(Warp& warp, std::uint32_t lanes);
    void fence_mbarrier_init(Warp& warp, std::uint32_t lanes);
    void init_mbarrier(Warp& warp, unsigned lane, std::uint32_t at, unsigned count, int line);
    // The mbarrier at an address; a report, and no return, where there is none.
    MBarrier& mbarrier(Warp& warp, unsigned lane, std::uint32_t at, int line);
    void arrive(Warp& warp, unsigned lane, std::uint32_t at, unsigned count, std::int64_t bytes,
                const Knowledge& knowledge, int line);
    void complete_bytes(MBarrier& barrier, std::int64_t bytes);
    // Delivers copies that complete on this mbarrier until its phase is not `phase` any more.
    void deliver_bulk(std::uint32_t at, std::uint64_t phase);
    void issue_bulk(Warp& warp, unsigned lane, BulkCopy copy);
    // A piece that a bulk store reads from shared memory and writes to global memory.
    void store_bulk(Warp& warp, unsigned lane, const CopyPiece& piece, int line);
    // As reach(), for an access that happens beside the thread that asks for it.
    unsigned char* reach_async(Warp& warp, unsigned lane, Space space, std::uint64_t address,
                               std::size_t bytes, Access kind, int line, unsigned agent);
    unsigned agent_of_store_reads(const Warp& w) const { return warp_count() + w.index; }
    unsigned agent_of_store_writes(const Warp& w) const { return 2 * warp_count() + w.index; }
    unsigned agent_of_wgmma(const Warp& w) const { return 3 * warp_count() + w.index / 4; }
    Flow commit_wgmma(Warp& warp, int line);
    // Whether all warps have committed so many groups.
    bool wgmma_complete(const Warp& warp, std::uint64_t groups, Time& when) const;
    Flow cluster_barrier(Warp& warp, std::uint32_t lanes, bool arrive, int line);
    // A tensor map that the warp copied to global memory, a lane's fence for it, and the map that
    // a copy uses: ptx_map_update.cpp.
    void publish_map(Warp& warp, std::uint64_t from, std::uint64_t to, int line);
    void acquire_map(Warp& warp, unsigned lane, std::uint64_t at);
    const unsigned char* reach_map(Warp& warp, unsigned lane, std::uint64_t at, int line);
    // A bulk store of the warp reads the map until its group is waited for.
    void hold_map(const Warp& warp, std::uint64_t at);
    unsigned warp_count() const { return static_cast<unsigned>(warps_.size()); }
    // Lets every warp look again at what it waits for.
    void wake();
    void issue_copy(Warp& warp, unsigned lane, const PendingCopy& copy);
    void deliver(Warp& warp, unsigned lane, const std::vector<PendingCopy>& copies);

    // The instruction at a line of the module's text.
    const char* opcode_at(int line) const;
    // A report about a thread.
    void about(const Warp& warp, unsigned lane) const;
    const Launch& launch() const { return launch_; }

  private:
    struct Barrier {
        unsigned arrived = 0;       // warps
        std::uint32_t waiting = 0;  // which of them
        unsigned expected = 0;
        unsigned threads = 0;
        unsigned yes = 0;  // threads whose predicate holds
        int line = 0;
        bool whole_block = false;
        Knowledge knowledge;  // of those that arrived
    };
    class Check;

    void start(Warp& warp, uint3 index);
    bool step(Warp& warp, int& turn);  // false: nothing in it can run
    void place(Warp& warp, std::uint32_t pc, std::uint32_t lanes);
    void exit_lanes(Warp& warp, std::uint32_t lanes);
    void complete(Barrier& barrier);
    [[noreturn]] void report_stuck();
    bool retry_polls();
    // Reports waits that the end of the mbarrier's phase is not ordered behind.
    void check_overtaken(MBarrier& barrier);
    // Reports, and gives up, if the warp waits for an mbarrier.
    void report_mbarrier_wait(Warp& warp);
    void check_accumulators(Warp& warp, const Instruction& instruction, std::uint32_t lanes);
    std::string who(unsigned thread) const;
    unsigned char* reach_global(Warp& warp, unsigned lane, std::uint64_t address, std::size_t bytes,
                                Access kind, int line, unsigned accessor, std::size_t alignment);
    unsigned char* reach_shared(Warp& warp, unsigned lane, std::uint64_t address, std::size_t bytes,
                                Access kind, int line, unsigned accessor);

    const Launch& launch_;
    Program& program_;
    unsigned threads_;
    std::vector<Warp> warps_;
    std::vector<unsigned char> shared_;
    std::vector<Cell> cells_;               // of shared memory
    std::vector<std::uint16_t> in_flight_;  // shared bytes that a cp.async will write: thread + 1
    Barrier barriers_[16];
    std::map<std::uint32_t, MBarrier> mbarriers_;  // by address
    unsigned mbarrier_agents_ = 0;
    std::deque<BulkCopy> bulk_copies_;
    std::vector<Warpgroup> warpgroups_;
    std::vector<std::vector<Time>> fences_;       // fence.proxy.async of each thread
    std::vector<std::vector<Time>> init_fences_;  // fence.mbarrier_init
    MBarrier cluster_;
    std::map<std::uint64_t, std::pair<Time, unsigned>> maps_;  // published: when, by which warp
    unsigned failed_polls_ = 0;  // in a row, with nothing in between that could help
    unsigned exited_warps_ = 0;
    Time started_ = kNever;
    uint3 index_{};
    std::mt19937 random_;
};

std::uint64_t special_value(Special special, const Launch& launch, const Warp& warp, unsigned lane,
                            uint3 block);

// Lanes of a warp-wide operation whose member mask is in `masks`: kNext when all are here, kWait
// when some are still to come. Reports masks that do not fit.
Flow gather(Warp& warp, const std::uint64_t* masks, std::uint32_t lanes, int line,
            std::uint32_t& members);

template <class F>
inline void for_lanes(std::uint32_t lanes, const F& f) {
    if (lanes == kAllLanes) {
        for (unsigned l = 0; l < 32; ++l) f(l);
    } else {
        for (std::uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
            f(static_cast<unsigned>(__builtin_ctz(rest)));
        }
    }
}

}  // namespace emulator::ptx
