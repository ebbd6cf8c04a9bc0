// Emulated global memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "shadow.hpp"

namespace emulator {

struct DeviceBuffer {
    unsigned char* base;
    std::size_t bytes;
    std::vector<Cell> cells;
};

// Whether this address is in the range from which device memory is given out.
bool is_device_address(const void* p);

// The buffer that holds [p, p + bytes), or null; `nearest` is the last one that begins at or before
// p.
DeviceBuffer* find_buffer(const void* p, std::size_t bytes, const DeviceBuffer** nearest);

}  // namespace emulator
