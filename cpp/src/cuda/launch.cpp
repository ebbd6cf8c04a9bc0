#include "launch.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "fastllm/cuda_device.hpp"

namespace fastllm::cuda {

void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
    }
}

DeviceGuard::DeviceGuard(int device) {
    int current = 0;
    check(cudaGetDevice(&current), "cudaGetDevice");
    if (current == device) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    previous_ = current;
}

DeviceGuard::~DeviceGuard() {
    if (previous_ >= 0) cudaSetDevice(previous_);  // was current before, so it exists
}

int multiprocessors() {
    int device = 0;
    int count = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
          "cudaDeviceGetAttribute");
    return count;
}

bool aligned16(std::initializer_list<const void*> pointers) {
    return std::all_of(pointers.begin(), pointers.end(),
                       [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; });
}

void require_indexable(std::int64_t cols) {
    if (cols > std::numeric_limits<std::int32_t>::max()) {
        throw std::runtime_error(std::to_string(cols) + " columns are more than the kernels index");
    }
}

RowLayout row_layout(DType dtype, std::int64_t cols, bool aligned, int packs_per_thread,
                     int max_threads) {
    require_indexable(cols);
    const int widest = 16 / static_cast<int>(size_in_bytes(dtype));
    const int width = aligned && cols % widest == 0 ? widest : 1;
    const std::int64_t packs = cols / width;
    const std::int64_t wanted = (packs + packs_per_thread - 1) / packs_per_thread;
    if (wanted <= 32) return {width, 32, 4};
    const std::int64_t threads = std::min<std::int64_t>((wanted + 31) / 32 * 32, max_threads);
    return {width, static_cast<int>(threads), 1};
}

std::int64_t parts_of_rows(std::int64_t rows, std::int64_t cols) {
    // Enough blocks to fill the device, but 16 rows or more in each beyond one per multiprocessor,
    // since every part's sums are written and read once more.
    const std::int64_t sms = multiprocessors();
    const std::int64_t per_sm = cols <= 1024 ? 16 : cols <= 4096 ? 4 : 2;
    const std::int64_t parts =
        std::min(sms * per_sm, std::max((rows + 15) / 16, std::min(rows, sms)));
    return std::max<std::int64_t>(4, (parts + 3) / 4 * 4);
}

unsigned blocks_of(std::int64_t count, std::int64_t per_block) {
    const std::int64_t blocks = (count + per_block - 1) / per_block;
    if (blocks > std::numeric_limits<std::int32_t>::max()) {
        throw std::runtime_error(std::to_string(blocks) +
                                 " blocks are more than one launch can take");
    }
    return static_cast<unsigned>(blocks);
}

unsigned blocks_for(std::int64_t rows, const RowLayout& layout) {
    return blocks_of(rows, layout.rows_per_block);
}

}  // namespace fastllm::cuda
