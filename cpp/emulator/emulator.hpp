// Runs CUDA kernels, compiled as C++20 by the host compiler, on the CPU under a checker. Tests
// only.
//
// Every CUDA thread of a block is a fiber; blocks run one after another. Barriers, shuffles and
// votes are real rendezvous, so divergence is found, not survived by luck. Kernel files are
// compiled with -fsanitize=thread but linked without libtsan: the calls that the compiler inserts
// before every memory access arrive in this library (access.cpp), which knows which bytes are
// initialised and who touched them last.
//
// What is reported (Report::kind):
//   out-of-bounds, misaligned            the launch is abandoned before the access happens
//   uninit-global, uninit-shared         a byte is read that nothing wrote
//   race-global, race-shared             two threads touch a byte, one writes, nothing orders them
//   divergent-barrier, barrier-after-exit, warp-mask, warp-diverged, shuffle, deadlock
//   launch                               a configuration that no device accepts
//
// Limits: memory is sequentially consistent; __threadfence orders nothing for the checker, so
// reductions that rely on it are reported; a byte remembers its last two readers; overruns inside a
// thread's local arrays are not seen. No clusters, no TMA, no inline PTX.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace emulator {

struct Options {
    // Order of threads in a block and of blocks: 0 ascending, 1 descending, else random with this
    // seed.
    unsigned schedule = 0;
    // Count sectors and shared-memory wavefronts. Slow.
    bool count_transactions = false;
    // Off: run for the values only.
    bool check = true;
    // What cudaDevAttrMultiProcessorCount answers.
    int multiprocessors = 4;
    // Which compute capability the device has: 80 or 90.
    int capability = 80;
};
Options& options();
// What a block may have of shared memory at most, of that capability.
std::size_t most_shared_memory();

// Of the last launch.
struct Counters {
    std::uint64_t read_bytes = 0;  // of global memory, as requested by threads
    std::uint64_t written_bytes = 0;
    std::uint64_t unique_read_bytes = 0;  // counting each byte once
    std::uint64_t unique_written_bytes = 0;
    std::uint64_t sectors = 0;         // 32-byte sectors touched by each warp-wide access, summed
    std::uint64_t min_sectors = 0;     // the same if every access were dense
    std::uint64_t wavefronts = 0;      // passes through shared memory; more than the minimum is a
    std::uint64_t min_wavefronts = 0;  //   bank conflict
    std::uint64_t barriers = 0;
    std::uint64_t warp_operations = 0;
    std::uint64_t threads = 0;
};
// Of all launches since the last call of clear_counters().
Counters& counters();
void clear_counters();

struct Report {
    std::string kind;
    std::string kernel;
    std::string text;
};
// At most three per kernel and kind; report_count() counts all.
const std::vector<Report>& reports();
std::size_t report_count();
void clear_reports();

// Global memory. Guarded on both sides, filled with 0xff (NaN in every float format), "never
// written".
void* device_malloc(std::size_t bytes);
void device_free(void* pointer);
void copy_to_device(void* device, const void* host, std::size_t bytes);
void copy_from_device(void* host, const void* device, std::size_t bytes);

// Returns false, with a report made, when the launch could not be completed.
bool run_grid(const char* name, dim3 grid, dim3 block, void (*body)(void*), void* argument);
void set_last_error(cudaError_t error);

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            [[maybe_unused]] void* stream, Arguments&&... arguments) {
    struct Call {
        void (*kernel)(Parameters...);
        std::tuple<std::decay_t<Parameters>...> arguments;
    } call{kernel, {std::forward<Arguments>(arguments)...}};
    const auto body = [](void* p) {
        auto* c = static_cast<Call*>(p);
        std::apply(c->kernel, c->arguments);
    };
    const bool ok = run_grid(name, grid, block, body, &call);
    set_last_error(ok ? cudaSuccess : cudaErrorLaunchFailure);
}

}  // namespace emulator
