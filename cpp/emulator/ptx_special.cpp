// Values of special registers.
#include "ptx_machine.hpp"

namespace emulator::ptx {

std::uint64_t special_value(Special s, const Launch& launch, const Warp& warp, unsigned lane,
                            uint3 index) {
    const dim3& block = launch.block;
    const dim3& grid = launch.grid;
    const unsigned thread = warp.thread(lane);
    const std::uint32_t bit = 1u << lane;
    switch (s) {
        case Special::kTidX:
            return thread % block.x;
        case Special::kTidY:
            return thread / block.x % block.y;
        case Special::kTidZ:
            return thread / (block.x * block.y);
        case Special::kNtidX:
            return block.x;
        case Special::kNtidY:
            return block.y;
        case Special::kNtidZ:
            return block.z;
        case Special::kCtaidX:
            return index.x;
        case Special::kCtaidY:
            return index.y;
        case Special::kCtaidZ:
            return index.z;
        case Special::kNctaidX:
            return grid.x;
        case Special::kNctaidY:
            return grid.y;
        case Special::kNctaidZ:
            return grid.z;
        case Special::kLane:
            return lane;
        case Special::kWarp:
            return warp.index;
        case Special::kWarps:
            return (block.x * block.y * block.z + 31) / 32;
        case Special::kMaskEq:
            return bit;
        case Special::kMaskLt:
            return bit - 1;
        case Special::kMaskLe:
            return bit | (bit - 1);
        case Special::kMaskGt:
            return ~(bit | (bit - 1));
        case Special::kMaskGe:
            return ~(bit - 1);
        case Special::kDynamicShared:
            return launch.dynamic_shared;
        case Special::kZero:
            return 0;
    }
    return 0;
}

}  // namespace emulator::ptx
