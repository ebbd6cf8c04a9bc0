// The emulator must report every bug planted here, and nothing in the same kernel without it.
#include "device.cuh"
#include "test.hpp"

namespace {

using fastllm::cuda::load_pack;
using fastllm::cuda::Pack;

// --- kernels: each has a `bug` switch ------------------------------------------------------------

__global__ void copy(const float* in, float* out, int count, bool bug) {
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (bug ? i <= count : i < count) out[i] = in[i];
}

struct Row {
    float of[256];
};

// out[block] = sum over `rounds` of the reversed row's first half; the buffer is written again each
// round.
__global__ void reverse(const float* in, float* out, int rounds, bool no_barrier_after_write,
                        bool no_barrier_after_read) {
    FASTLLM_SHARED(Row, row);
    const int n = static_cast<int>(blockDim.x);
    const int i = static_cast<int>(threadIdx.x);
    float sum = 0.0f;
    for (int round = 0; round < rounds; ++round) {
        row.of[i] = in[round * n + i];
        if (!no_barrier_after_write) __syncthreads();
        sum += row.of[n - 1 - i];
        if (!no_barrier_after_read) __syncthreads();
    }
    out[i] = sum;
}

__global__ void diverging_barrier(float* out, bool bug) {
    if (bug && threadIdx.x < 64) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = 1.0f;
}

__global__ void leave_before_barrier(float* out, bool bug) {
    if (bug && threadIdx.x >= 48) return;
    __syncthreads();
    out[threadIdx.x] = 1.0f;
}

__global__ void write_one_word(float* out, bool bug) {
    if (bug || threadIdx.x == 0) *out = 2.0f;
}

__global__ void accumulate(float* out, bool bug) {
    if (threadIdx.x != 0) return;
    if (bug) {
        *out += 1.0f;
    } else {
        atomicAdd(out, 1.0f);
    }
}

__global__ void atomic_and_plain(float* out, bool bug) {
    if (bug && threadIdx.x == 7) {
        *out = 0.0f;
    } else {
        atomicAdd(out, 1.0f);
    }
}

__global__ void wide_load(const float* in, float* out, int offset) {
    const Pack<float, 4> pack = load_pack<4>(in + offset + 4 * threadIdx.x);
    out[threadIdx.x] = pack.lane[0] + pack.lane[3];
}

__global__ void shuffle(float* out, unsigned mask, bool in_branch) {
    float v = static_cast<float>(threadIdx.x);
    if (in_branch && threadIdx.x >= 16) {
        v = -1.0f;
    } else {
        v = __shfl_xor_sync(mask, v, 1);
    }
    out[threadIdx.x] = v;
}

__global__ void exchange_in_warp(float* out, bool bug) {
    FASTLLM_SHARED(Row, row);
    row.of[threadIdx.x] = static_cast<float>(threadIdx.x);
    if (!bug) __syncwarp();
    out[threadIdx.x] = row.of[threadIdx.x ^ 1];
}

__global__ void overrun_shared(float* out, int index) {
    FASTLLM_SHARED(Row, row);
    row.of[threadIdx.x] = 1.0f;
    __syncthreads();
    out[threadIdx.x] = row.of[threadIdx.x == 0 ? index : 0];
}

// A reduction of which only the first warp's lower lanes take part in the second step.
__global__ void reduce_in_part(float* out, bool bug) {
    float v = static_cast<float>(threadIdx.x);
    for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
    if (!bug || threadIdx.x < 8) v += __shfl_xor_sync(0xffffffffu, v, 1);
    __syncthreads();
    out[threadIdx.x] = v;
}

// Reads where `index` floats behind `in` is, however far.
__global__ void read_far(const float* in, float* out, long long index) {
    out[threadIdx.x] = in[index] + in[threadIdx.x];
}

struct Tile {
    float of[32 * 33];
};

// Writes rows of a tile and reads columns; conflict-free with a pitch of 33 words.
__global__ void transpose(const float* in, float* out, int pitch) {
    FASTLLM_SHARED(Tile, tile);
    tile.of[threadIdx.y * pitch + threadIdx.x] = in[threadIdx.y * 32 + threadIdx.x];
    __syncthreads();
    out[threadIdx.y * 32 + threadIdx.x] = tile.of[threadIdx.x * pitch + threadIdx.y];
}

__global__ void strided_copy(const float* in, float* out, int count, int stride) {
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    out[i] = in[i * stride % count];
}

// --- running them --------------------------------------------------------------------------------

class Floats {
  public:
    explicit Floats(int count, bool initialised = true) : count_(count) {
        data_ = static_cast<float*>(emulator::device_malloc(count * sizeof(float)));
        if (!initialised) return;
        std::vector<float> values(count);
        for (int i = 0; i < count; ++i) values[i] = static_cast<float>(i);
        emulator::copy_to_device(data_, values.data(), count * sizeof(float));
    }
    ~Floats() { emulator::device_free(data_); }
    Floats(const Floats&) = delete;
    Floats& operator=(const Floats&) = delete;
    float* data() const { return data_; }
    std::vector<float> get() const {
        std::vector<float> values(count_);
        emulator::copy_from_device(values.data(), data_, count_ * sizeof(float));
        return values;
    }

  private:
    int count_;
    float* data_;
};

// The kinds of what was reported since the last call, each once.
std::vector<std::string> kinds() {
    std::vector<std::string> found;
    for (const emulator::Report& r : emulator::reports()) {
        bool known = false;
        for (const std::string& kind : found) known = known || kind == r.kind;
        if (!known) found.push_back(r.kind);
    }
    emulator::clear_reports();
    cudaGetLastError();
    return found;
}

using Kinds = std::vector<std::string>;

bool contains(const Kinds& kinds, const std::string& kind) {
    for (const std::string& k : kinds) {
        if (k == kind) return true;
    }
    return false;
}

// Runs `launch(bug)` in several schedules: clean without the bug, reported with it in every one.
template <class Launch>
void expect_report(const char* kind, const Launch& launch) {
    for (const unsigned schedule : {0u, 1u, 5u, 6u}) {
        emulator::options().schedule = schedule;
        kinds();
        launch(false);
        CHECK_EQ(kinds(), Kinds{});
        launch(true);
        const Kinds found = kinds();
        CHECK_EQ(contains(found, kind) ? Kinds{kind} : found, Kinds{kind});
    }
    emulator::options().schedule = 0;
}

#define RUN(kernel, grid, block, ...) \
    FASTLLM_LAUNCH(kernel, dim3(grid), block, nullptr, __VA_ARGS__)

}  // namespace

TEST(loop_bound_past_the_buffer) {
    expect_report("out-of-bounds", [](bool bug) {
        const Floats in(300), out(300, false);
        RUN(copy, 2, dim3(256), in.data(), out.data(), 300, bug);
        if (!bug) CHECK_EQ(out.get(), in.get());
    });
}

TEST(use_after_free) {
    const Floats out(8, false);
    float* dangling;
    {
        const Floats in(8);
        dangling = in.data();
    }
    RUN(copy, 1, dim3(8), dangling, out.data(), 8, false);
    CHECK_EQ(kinds(), Kinds{"out-of-bounds"});
}

TEST(uninitialised_global) {
    expect_report("uninit-global", [](bool bug) {
        const Floats in(64, !bug), out(64, false);
        RUN(copy, 1, dim3(64), in.data(), out.data(), 64, false);
    });
}

TEST(missing_barrier_between_write_and_read) {
    expect_report("race-shared", [](bool bug) {
        const Floats in(512), out(256, false);
        RUN(reverse, 1, dim3(256), in.data(), out.data(), 2, bug, false);
    });
}

TEST(missing_barrier_before_the_buffer_is_written_again) {
    // The values are right in ascending order of threads: only the checker can see this one.
    expect_report("race-shared", [](bool bug) {
        const Floats in(512), out(256, false);
        RUN(reverse, 1, dim3(256), in.data(), out.data(), 2, false, bug);
    });
}

TEST(barrier_in_divergent_branches) {
    expect_report("divergent-barrier", [](bool bug) {
        const Floats out(128, false);
        RUN(diverging_barrier, 1, dim3(128), out.data(), bug);
    });
}

TEST(return_before_a_barrier) {
    expect_report("barrier-after-exit", [](bool bug) {
        const Floats out(64, false);
        RUN(leave_before_barrier, 1, dim3(64), out.data(), bug);
    });
}

TEST(all_threads_write_one_word) {
    expect_report("race-global", [](bool bug) {
        const Floats out(1, false);
        RUN(write_one_word, 1, dim3(64), out.data(), bug);
    });
}

TEST(blocks_accumulate_without_atomics) {
    expect_report("race-global", [](bool bug) {
        const Floats out(1);
        RUN(accumulate, 8, dim3(32), out.data(), bug);
        const float sum = out.get()[0];
        CHECK_EQ(sum, 8.0f);  // right either way, one block after the other
    });
}

TEST(atomic_and_plain_access_to_one_word) {
    expect_report("race-global", [](bool bug) {
        const Floats out(1);
        RUN(atomic_and_plain, 1, dim3(32), out.data(), bug);
    });
}

TEST(misaligned_wide_access) {
    expect_report("misaligned", [](bool bug) {
        const Floats in(132), out(32, false);
        RUN(wide_load, 1, dim3(32), in.data(), out.data(), bug ? 1 : 0);
    });
}

TEST(shuffle_with_a_lane_outside_its_mask) {
    expect_report("warp-mask", [](bool bug) {
        const Floats out(32, false);
        RUN(shuffle, 1, dim3(32), out.data(), bug ? 0x0000ffffu : 0xffffffffu, false);
    });
}

TEST(shuffle_that_some_lanes_of_the_mask_never_reach) {
    expect_report("warp-mask", [](bool bug) {
        const Floats out(32, false);
        RUN(shuffle, 1, dim3(32), out.data(), 0xffffffffu, bug);
    });
}

TEST(lanes_of_a_reduction_wait_without_end) {
    expect_report("deadlock", [](bool bug) {
        const Floats out(64, false);
        RUN(reduce_in_part, 1, dim3(64), out.data(), bug);
    });
}

TEST(a_deadlock_is_told_by_warp_lanes_and_line) {
    const Floats out(64, false);
    kinds();
    RUN(reduce_in_part, 1, dim3(64), out.data(), true);
    bool told = false;
    for (const emulator::Report& r : emulator::reports()) {
        if (r.kind != "deadlock") continue;
        CHECK_EQ(r.kernel, std::string("reduce_in_part"));
        told = told || r.text.find("lanes 000000ff of warp 0 wait at test_emulator.cu:") !=
                           std::string::npos;
    }
    CHECK_EQ(told, true);
    kinds();
}

TEST(pointers_far_from_any_buffer) {
    // Beyond the device's addresses, where nothing is mapped, and near the end of all addresses.
    const Floats in(32);
    for (const float* far :
         {static_cast<const float*>(in.data()) + (1LL << 44), reinterpret_cast<const float*>(-64)}) {
        expect_report("out-of-bounds", [&](bool bug) {
            const Floats out(32, false);
            RUN(read_far, 1, dim3(32), in.data(), out.data(), bug ? far - in.data() : 0LL);
        });
    }
}

TEST(exchange_without_syncwarp) {
    expect_report("race-shared", [](bool bug) {
        const Floats out(32, false);
        RUN(exchange_in_warp, 1, dim3(32), out.data(), bug);
    });
}

TEST(shared_overrun) {
    expect_report("out-of-bounds", [](bool bug) {
        const Floats out(256, false);
        RUN(overrun_shared, 1, dim3(256), out.data(), bug ? 256 : 255);
    });
}

TEST(launch_configuration) {
    const Floats out(1, false);
    RUN(write_one_word, 1, dim3(1025), out.data(), false);
    CHECK_EQ(cudaGetLastError() == cudaErrorLaunchFailure, true);
    CHECK_EQ(kinds(), Kinds{"launch"});
}

TEST(values_of_shuffles) {
    const Floats out(32, false);
    RUN(shuffle, 1, dim3(32), out.data(), 0xffffffffu, false);
    const std::vector<float> values = out.get();
    for (int i = 0; i < 32; ++i) CHECK_EQ(values[i], static_cast<float>(i ^ 1));
    CHECK_EQ(kinds(), Kinds{});
}

TEST(sectors_of_strided_copies) {
    emulator::options().count_transactions = true;
    const Floats in(4096), out(4096, false);
    // The writes are dense, 512 sectors; reads of stride s touch s times as many, up to one per
    // lane.
    for (const auto& [stride, sectors] : {std::pair{1, 1024}, {2, 1536}, {8, 4608}}) {
        emulator::clear_counters();
        RUN(strided_copy, 16, dim3(256), in.data(), out.data(), 4096, stride);
        CHECK_EQ(emulator::counters().sectors, static_cast<std::uint64_t>(sectors));
        CHECK_EQ(emulator::counters().min_sectors, std::uint64_t{1024});
    }
    emulator::options().count_transactions = false;
}

TEST(bank_conflicts_of_a_transpose) {
    emulator::options().count_transactions = true;
    const Floats in(1024), out(1024, false);
    // 32 warp-wide writes of one pass each, and 32 reads: 32 passes each when all lanes hit one
    // bank.
    for (const auto& [pitch, wavefronts] : {std::pair{33, 64}, {32, 32 + 32 * 32}}) {
        emulator::clear_counters();
        RUN(transpose, 1, dim3(32, 32), in.data(), out.data(), pitch);
        CHECK_EQ(emulator::counters().wavefronts, static_cast<std::uint64_t>(wavefronts));
        CHECK_EQ(emulator::counters().min_wavefronts, std::uint64_t{64});
    }
    emulator::options().count_transactions = false;
    CHECK_EQ(kinds(), Kinds{});
}

TEST_MAIN()
