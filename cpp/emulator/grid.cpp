// Launches: the blocks of a grid in the order of the schedule.
#include <algorithm>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "access.hpp"
#include "block.hpp"
#include "emulator.hpp"
#include "report.hpp"

namespace emulator {
namespace {

Time clock_now = kBeforeAnyLaunch;
Time launch_time = kBeforeAnyLaunch;

// Stacks are expensive to set up, so a block of each size is kept.
Block& block_of(unsigned threads) {
    static std::map<unsigned, std::unique_ptr<Block>> blocks;
    auto& block = blocks[threads];
    if (!block) block = std::make_unique<Block>(threads);
    return *block;
}

bool valid(dim3 grid, dim3 block) {
    const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
    return threads >= 1 && threads <= 1024 && block.z <= 64 && grid.x >= 1 && grid.y >= 1 &&
           grid.z >= 1 && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535;
}

std::vector<std::uint32_t> block_order(std::uint64_t blocks) {
    std::vector<std::uint32_t> order(blocks);
    std::iota(order.begin(), order.end(), 0u);
    if (options().schedule == 1) std::reverse(order.begin(), order.end());
    if (options().schedule > 1) {
        std::shuffle(order.begin(), order.end(), std::mt19937(options().schedule));
    }
    return order;
}

}  // namespace

Time now() { return clock_now; }
Time advance_time() { return ++clock_now; }
Time launch_started() { return launch_time; }
void begin_launch() { launch_time = advance_time(); }

Options& options() {
    static Options instance;
    return instance;
}

std::size_t most_shared_memory() { return (options().capability >= 90 ? 227 : 163) << 10; }

Counters& counters() {
    static Counters instance;
    return instance;
}

void clear_counters() { counters() = Counters{}; }

bool run_grid(const char* name, dim3 grid, dim3 block, void (*body)(void*), void* argument) {
    begin_reports_of(name);
    ThreadView& view = current_thread();
    view = ThreadView{};
    if (!valid(grid, block)) {
        report("launch", "grid (%u,%u,%u) of blocks (%u,%u,%u)", grid.x, grid.y, grid.z, block.x,
               block.y, block.z);
        return false;
    }
    view.block_dim = block;
    view.grid_dim = grid;
    begin_launch();
    const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
    const unsigned threads = block.x * block.y * block.z;
    counters().threads += blocks * threads;
    Block& runner = block_of(threads);
    runner.seed(options().schedule);
    for (const std::uint32_t b : block_order(blocks)) {
        view.block = {b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)};
        if (!runner.run(body, argument)) return false;
        finish_transactions();
    }
    return true;
}

}  // namespace emulator
