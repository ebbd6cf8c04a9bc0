// The functions that -fsanitize=thread makes device code call before each access. libtsan is not
// linked; these take its place.
#include <cstddef>
#include <cstdint>

#include "access.hpp"

using emulator::Access;

#define SITE __builtin_return_address(0)
#define HOOKS(bytes)                                                                               \
    void __tsan_read##bytes(void* p) { emulator::access(p, bytes, Access::kRead, SITE); }          \
    void __tsan_write##bytes(void* p) { emulator::access(p, bytes, Access::kWrite, SITE); }        \
    void __tsan_unaligned_read##bytes(void* p) {                                                   \
        emulator::access(p, bytes, Access::kRead, SITE);                                           \
    }                                                                                              \
    void __tsan_unaligned_write##bytes(void* p) {                                                  \
        emulator::access(p, bytes, Access::kWrite, SITE);                                          \
    }                                                                                              \
    void __tsan_volatile_read##bytes(void* p) { emulator::access(p, bytes, Access::kRead, SITE); } \
    void __tsan_volatile_write##bytes(void* p) { emulator::access(p, bytes, Access::kWrite, SITE); }

namespace {

// A struct copied as a whole: device code would move it in pieces of at most 16 bytes.
void range(const void* p, std::size_t bytes, Access kind, const void* site) {
    const auto* begin = static_cast<const unsigned char*>(p);
    for (std::size_t i = 0; i < bytes; ++i) emulator::access(begin + i, 1, kind, site);
}

}  // namespace

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, std::size_t bytes) { range(p, bytes, Access::kRead, SITE); }
void __tsan_write_range(void* p, std::size_t bytes) { range(p, bytes, Access::kWrite, SITE); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// Guards of function-local statics in the launchers.
std::uint8_t __tsan_atomic8_load(const std::uint8_t* p, int) {
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
}
