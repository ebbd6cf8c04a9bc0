// One block in execution: its threads, barriers, warp-wide operations and shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "fiber.hpp"
#include "shadow.hpp"

namespace emulator {

// threadIdx, blockIdx, blockDim and gridDim of the running thread.
struct ThreadView {
    uint3 thread{};
    uint3 block{};
    dim3 block_dim{};
    dim3 grid_dim{};
    unsigned linear = 0;  // index of the thread in its block
};
ThreadView& current_thread();

// A place in the source, which identifies a barrier or warp-wide operation: a compiler may copy the
// call to several addresses.
struct Site {
    const char* file = nullptr;
    unsigned line = 0;
    bool operator==(const Site& other) const;
    std::string text() const;  // file name and line
};

enum class WarpOp { kSyncWarp, kShuffle, kVote };

// A warp-wide operation in progress: lanes deposit 16 bytes and leave when all of `mask` have
// arrived.
struct Collective {
    std::uint32_t mask = 0;
    std::uint32_t arrived = 0;
    std::uint32_t unread = 0;  // lanes that have not yet taken their result; the slot is free at 0
    WarpOp op{};
    Site site;
    alignas(16) unsigned char data[32][16];
};

struct Warp {
    std::uint32_t present = 0;
    std::uint32_t exited = 0;
    Time synced = kNever;  // the last __syncwarp of all lanes
    Collective slots[4];
    // Time of the last __syncwarp of both lanes, where it was for a part of the warp only.
    std::unique_ptr<Time[]> pair_synced;
};

struct Thread {
    Context context;
    uint3 index{};
    enum class State { kReady, kAtBarrier, kInWarpOp, kDone } state = State::kReady;
    Site site;  // where it waits
};

struct SharedMemory {
    static constexpr std::size_t kCapacity = 48 << 10;  // what a kernel may declare statically
    std::vector<unsigned char> bytes;
    std::vector<Cell> cells;
    std::unordered_map<const void*, std::size_t> offset_of;
    std::size_t used = 0;
};

class Block {
  public:
    explicit Block(unsigned threads);

    void seed(unsigned schedule) { random_.seed(schedule); }

    // False when the block was abandoned.
    bool run(void (*body)(void*), void* argument);

    void barrier(Site site);
    Collective& warp_operation(WarpOp op, std::uint32_t mask, const void* in, std::size_t bytes,
                               Site site);
    void finish_warp_operation(Collective& collective);
    unsigned char* shared_variable(const void* key, std::size_t bytes, std::size_t alignment);
    [[noreturn]] void abandon();

    // Whether what thread `other` did at `when` is ordered before what the running thread does now.
    bool ordered_before_now(unsigned other, Time when) const;

    // One more access of the running thread; gives a block up that makes them without end.
    void count_access();
    // Whether an address is in the running thread's own variables.
    bool on_own_stack(const void* p) const;

    SharedMemory& shared() { return shared_; }
    Time started() const { return started_; }
    bool running() const { return current_ != nullptr; }

  private:
    static constexpr std::uint64_t kMostAccesses = std::uint64_t{1} << 32;
    static void thread_main();
    void make_ready(unsigned index);
    unsigned take_ready();
    void run_next(Thread& me);
    void enter(unsigned index);
    void complete_barrier();
    void exit_current();
    void report_deadlock();

    std::vector<Thread> threads_;
    std::vector<Warp> warps_;
    Stacks stacks_;
    SharedMemory shared_;
    std::vector<unsigned> ready_;  // a ring of thread indices
    std::size_t ready_begin_ = 0;
    std::size_t ready_count_ = 0;
    Context main_;
    Thread* current_ = nullptr;
    void (*body_)(void*) = nullptr;
    void* argument_ = nullptr;
    unsigned done_ = 0;
    unsigned waiting_ = 0;  // at the barrier
    Site barrier_site_;
    Time barrier_time_ = kNever;
    Time started_ = kNever;
    std::uint64_t accesses_ = 0;
    bool abandoned_ = false;
    std::mt19937 random_;
};

// The block in execution, or null.
Block* current_block();

Time now();
Time advance_time();

// When the running launch began: what happened before is ordered before all of it.
Time launch_started();
void begin_launch();

}  // namespace emulator
