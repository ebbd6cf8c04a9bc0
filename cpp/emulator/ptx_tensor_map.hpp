// What a tensor map (CUtensorMap) holds here: as cuTensorMapEncodeTiled was told.
#pragma once

#include <cstdint>

namespace emulator::ptx {

struct TensorMap {
    static constexpr std::uint64_t kMagic = 0x70616d726f736e65;
    static constexpr std::uint64_t kMostStride = std::uint64_t{1} << 40;

    std::uint64_t magic;
    std::uint64_t address;
    std::uint8_t rank;
    std::uint8_t element_bytes;
    std::uint8_t swizzle_bytes;  // 0, 32, 64, 128
    std::uint8_t unused[5];
    std::uint64_t stride[4];  // bytes, of dimensions 1 and up
    std::uint32_t size[5];    // elements; dimension 0 is the dense one
    std::uint16_t box[5];
};
static_assert(sizeof(TensorMap) <= 128);

// 16-byte pieces of a swizzled tile: bits 4.. of the address are mixed with bits 7.. (PTX ISA,
// "Swizzling modes").
inline std::uint32_t swizzled(std::uint32_t address, unsigned bytes) {
    return bytes == 0 ? address : address ^ ((address >> 3) & (bytes - 16));
}

}  // namespace emulator::ptx
