// The spellings of CUDA C++ that kernels use, for the host compiler. Device code includes this
// through src/cuda/device.cuh in place of nvcc's own definitions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "access.hpp"
#include "block.hpp"
#include "emulator.hpp"
#include "report.hpp"

#undef __global__
#define __global__
#undef __device__
#define __device__
#undef __host__
#define __host__
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __forceinline__
#define __forceinline__ inline

#define threadIdx (::emulator::current_thread().thread)
#define blockIdx (::emulator::current_thread().block)
#define blockDim (::emulator::current_thread().block_dim)
#define gridDim (::emulator::current_thread().grid_dim)

// Not inlined, so that the return address is the place of the call; not instrumented, so that the
// access counts once, as what it is.
#define EMULATOR_CALL __attribute__((noinline, noclone, no_sanitize("thread")))
#define EMULATOR_PC __builtin_extract_return_addr(__builtin_return_address(0))
#define EMULATOR_INLINE inline __attribute__((always_inline))

// The caller's place, as last parameters: default arguments are evaluated where a function is
// called.
#define EMULATOR_FROM_HERE const char *file = __builtin_FILE(), unsigned line = __builtin_LINE()
#define EMULATOR_SITE (emulator::Site{file, line})

namespace emulator {

template <class T>
T& shared_variable(const void* key) {
    return *reinterpret_cast<T*>(current_block()->shared_variable(key, sizeof(T), alignof(T)));
}

// One access of so many bytes, whatever the host compiler would make of it.
EMULATOR_CALL inline void load(void* to, const void* from, std::size_t bytes) {
    access(from, bytes, Access::kRead, EMULATOR_PC);
    std::memcpy(to, from, bytes);
}

EMULATOR_CALL inline void store(void* to, const void* from, std::size_t bytes) {
    access(to, bytes, Access::kWrite, EMULATOR_PC);
    std::memcpy(to, from, bytes);
}

// The value that `source` holds; `source` must take part.
template <class T>
EMULATOR_CALL T shuffle(std::uint32_t mask, T value, unsigned source, Site site) {
    static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
    Block& block = *current_block();
    Collective& c = block.warp_operation(WarpOp::kShuffle, mask, &value, sizeof value, site);
    if ((c.mask >> source & 1) == 0) {
        report("shuffle", "reads lane %u, which is not in mask %08x", source, c.mask);
    } else {
        std::memcpy(&value, c.data[source], sizeof value);
    }
    block.finish_warp_operation(c);
    return value;
}

inline unsigned lane() { return current_thread().linear % 32; }

template <class T, class F>
EMULATOR_CALL T atomically(T* p, const F& update) {
    access(p, sizeof(T), Access::kAtomic, EMULATOR_PC);
    T old;
    std::memcpy(&old, p, sizeof(T));
    const T next = update(old);
    std::memcpy(p, &next, sizeof(T));
    return old;
}

}  // namespace emulator

EMULATOR_CALL inline void __syncthreads(EMULATOR_FROM_HERE) {
    emulator::current_block()->barrier(EMULATOR_SITE);
}

EMULATOR_CALL inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_FROM_HERE) {
    emulator::Block& block = *emulator::current_block();
    block.finish_warp_operation(
        block.warp_operation(emulator::WarpOp::kSyncWarp, mask, nullptr, 0, EMULATOR_SITE));
}

EMULATOR_CALL inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_FROM_HERE) {
    emulator::Block& block = *emulator::current_block();
    const unsigned char vote = predicate != 0;
    emulator::Collective& c =
        block.warp_operation(emulator::WarpOp::kVote, mask, &vote, 1, EMULATOR_SITE);
    unsigned votes = 0;
    for (unsigned i = 0; i < 32; ++i) {
        if ((c.mask >> i & 1) && c.data[i][0] != 0) votes |= 1u << i;
    }
    block.finish_warp_operation(c);
    return votes;
}

template <class T>
EMULATOR_INLINE T __shfl_sync(unsigned mask, T value, int source, EMULATOR_FROM_HERE) {
    return emulator::shuffle(mask, value, static_cast<unsigned>(source) % 32, EMULATOR_SITE);
}
template <class T>
EMULATOR_INLINE T __shfl_xor_sync(unsigned mask, T value, int bits, EMULATOR_FROM_HERE) {
    return emulator::shuffle(mask, value, (emulator::lane() ^ static_cast<unsigned>(bits)) % 32,
                             EMULATOR_SITE);
}
template <class T>
EMULATOR_INLINE T __shfl_down_sync(unsigned mask, T value, unsigned delta, EMULATOR_FROM_HERE) {
    const unsigned source = emulator::lane() + delta;
    return emulator::shuffle(mask, value, source < 32 ? source : emulator::lane(), EMULATOR_SITE);
}
template <class T>
EMULATOR_INLINE T __shfl_up_sync(unsigned mask, T value, unsigned delta, EMULATOR_FROM_HERE) {
    const unsigned source = emulator::lane() - delta;
    return emulator::shuffle(mask, value, source < 32 ? source : emulator::lane(), EMULATOR_SITE);
}

template <class T>
EMULATOR_INLINE T atomicAdd(T* p, T value) {
    return emulator::atomically(p, [&](T old) { return old + value; });
}
template <class T>
EMULATOR_INLINE T atomicMax(T* p, T value) {
    return emulator::atomically(p, [&](T old) { return old < value ? value : old; });
}

EMULATOR_INLINE float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
EMULATOR_INLINE float __expf(float x) { return std::exp(x); }
EMULATOR_INLINE float __logf(float x) { return std::log(x); }
EMULATOR_INLINE float __fdividef(float a, float b) { return a / b; }
EMULATOR_INLINE float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
EMULATOR_INLINE unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
