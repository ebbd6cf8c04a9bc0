// State of what runs beside the warps of a block on sm_90: mbarriers, bulk copies, wgmma.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <vector>

#include "ptx_clock.hpp"
#include "ptx_program.hpp"

namespace emulator::ptx {

// Lanes of a warp whose wait succeeded in one instruction.
struct PhaseWait {
    unsigned warp;
    std::uint32_t lanes;
    Time when;
    int line;
};

// An mbarrier object in shared memory (PTX ISA, "mbarrier"). A phase ends when all arrivals and all
// announced bytes have come.
struct MBarrier {
    unsigned expected = 0;  // arrivals in each phase
    unsigned pending = 0;   // in this one
    std::int64_t bytes = 0;
    std::uint64_t phase = 0;
    std::vector<PhaseWait> waited;  // successful waits for the phase before this one
    Knowledge arriving;             // of those that arrived in this phase
    Knowledge completed;            // of those that arrived in all earlier ones
    unsigned agent = 0;             // the copies that complete here
    unsigned initialised_by = 0;
    Time initialised = kNever;
    int line = 0;
};

// 16 bytes or fewer of a bulk copy into shared memory; what is beyond `valid` becomes zeros.
struct CopyPiece {
    std::uint32_t to;
    std::uint16_t bytes;
    std::uint16_t valid;
    std::uint64_t from;
};

// A bulk copy that has been issued and not delivered.
struct BulkCopy {
    std::uint32_t mbarrier = 0;
    unsigned thread = 0;  // the issuer
    int line = 0;
    std::size_t bytes = 0;
    std::vector<CopyPiece> pieces;
};

// Bulk stores of one thread since the last commit, and groups of them.
struct BulkStores {
    struct Group {
        Time committed;
        unsigned stores;
    };
    unsigned open = 0;
    std::deque<Group> reading;  // groups that may still read shared memory
    std::deque<Group> writing;  // groups that may still write global memory
};

// One warp's part of its warpgroup's wgmma operations.
struct WgmmaState {
    std::vector<Row> open;                // accumulators since the last commit
    std::deque<std::vector<Row>> groups;  // of each group not waited for
    std::vector<std::uint16_t> in_use;    // by row: operations not waited for
    unsigned operations = 0;              // groups not waited for, with the open one
    std::uint64_t committed = 0;
    bool at_commit = false;
    bool passed_commit = false;
    bool fenced = false;
    // What the last operations left in the accumulators, to see who else writes them.
    std::vector<std::pair<Row, std::array<std::uint64_t, 32>>> left;
};

// The groups that all four warps of a warpgroup have committed.
struct Warpgroup {
    std::uint32_t arrived = 0;  // warps at the commit
    std::vector<Time> groups;   // when each was complete
};

}  // namespace emulator::ptx
