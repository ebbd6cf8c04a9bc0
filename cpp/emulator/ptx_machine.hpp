// One block of a grid in execution, warp by warp.
//
// A warp is a set of fragments: lanes that stand at the same instruction. The fragment that is
// furthest behind runs first, so lanes that diverged meet again where the compiler lets them. What
// orders memory accesses is kept apart from that order of execution: barriers and bar.warp.sync,
// never the luck of lockstep.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <deque>
#include <random>
#include <vector>

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
    std::vector<Time> clock;        // vector clock: what this warp knows of each
    std::vector<unsigned char> local;
    std::vector<PendingCopy> open[32];  // cp.async since the last commit
    std::deque<std::vector<PendingCopy>> groups[32];
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
        std::vector<Time> clock;  // what those that arrived know
    };
    class Check;

    void start(Warp& warp, uint3 index);
    bool step(Warp& warp, int& turn);  // false: nothing in it can run
    void place(Warp& warp, std::uint32_t pc, std::uint32_t lanes);
    void exit_lanes(Warp& warp, std::uint32_t lanes);
    void complete(Barrier& barrier);
    [[noreturn]] void report_stuck();
    bool ordered(unsigned thread, unsigned other, Time when) const;
    unsigned char* reach_global(Warp& warp, unsigned lane, std::uint64_t address, std::size_t bytes,
                                Access kind, int line);
    unsigned char* reach_shared(Warp& warp, unsigned lane, std::uint64_t address, std::size_t bytes,
                                Access kind, int line);

    const Launch& launch_;
    Program& program_;
    unsigned threads_;
    std::vector<Warp> warps_;
    std::vector<unsigned char> shared_;
    std::vector<Cell> cells_;               // of shared memory
    std::vector<std::uint16_t> in_flight_;  // shared bytes that a cp.async will write: thread + 1
    Barrier barriers_[16];
    unsigned exited_warps_ = 0;
    Time started_ = kNever;
    uint3 index_{};
    std::mt19937 random_;
};

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
