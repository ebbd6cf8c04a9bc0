// What the checker remembers of each byte of global and shared memory.
//
// Time is a counter that advances at every synchronisation. Since fibers and blocks take turns on
// one OS thread, "at time t by thread u" and the times of a thread's last barriers tell whether
// that access is ordered before the present one.
#pragma once

#include <cstdint>

namespace emulator {

using Time = std::uint32_t;
inline constexpr Time kNever = 0;
inline constexpr Time kBeforeAnyLaunch = 1;

struct Cell {
    Time written = kNever;
    Time read[2] = {kNever, kNever};  // the last two readers
    std::uint16_t writer = 0;         // threads, by linear index in the block
    std::uint16_t reader[2] = {0, 0};
    bool atomically = false;  // the last write was an atomic operation
    bool allocated = false;   // shared memory only
};

enum class Access { kRead, kWrite, kAtomic };

}  // namespace emulator
