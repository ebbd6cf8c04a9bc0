#include "device_memory.hpp"

#include <sys/mman.h>

#include <cstring>
#include <map>
#include <new>
#include <stdexcept>

#include "emulator.hpp"

namespace emulator {
namespace {

constexpr std::size_t kReserved = std::size_t{64} << 30;  // addresses, not memory
constexpr std::size_t kPage = 4096;

struct Arena {
    unsigned char* base = nullptr;
    std::size_t used = 0;
    std::map<const unsigned char*, DeviceBuffer> live;
    DeviceBuffer* last = nullptr;

    Arena() {
        void* p =
            mmap(nullptr, kReserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) throw std::bad_alloc();
        base = static_cast<unsigned char*>(p);
    }
};

Arena& arena() {
    static Arena instance;
    return instance;
}

DeviceBuffer& buffer_of(const void* p, std::size_t bytes) {
    const DeviceBuffer* nearest;
    DeviceBuffer* buffer = find_buffer(p, bytes, &nearest);
    if (buffer == nullptr) throw std::invalid_argument("copy outside of emulated device memory");
    return *buffer;
}

}  // namespace

bool is_device_address(const void* p) {
    const Arena& a = arena();
    return static_cast<std::size_t>(static_cast<const unsigned char*>(p) - a.base) < kReserved;
}

DeviceBuffer* find_buffer(const void* p, std::size_t bytes, const DeviceBuffer** nearest) {
    Arena& a = arena();
    const auto* address = static_cast<const unsigned char*>(p);
    const auto inside = [&](const DeviceBuffer& b) {
        // Addresses near the end of the address space must not wrap around.
        return address >= b.base && bytes <= b.bytes &&
               static_cast<std::size_t>(address - b.base) <= b.bytes - bytes;
    };
    *nearest = nullptr;
    if (a.last != nullptr && inside(*a.last)) return a.last;
    auto it = a.live.upper_bound(address);
    if (it == a.live.begin()) return nullptr;
    --it;
    *nearest = &it->second;
    if (!inside(it->second)) return nullptr;
    return a.last = &it->second;
}

void* device_malloc(std::size_t bytes) {
    Arena& a = arena();
    const std::size_t pages = (bytes + kPage - 1) / kPage;
    // Addresses are never given out twice, so that a use after free is out of bounds.
    const std::size_t offset = a.used + kPage;
    if (offset + pages * kPage > kReserved) throw std::bad_alloc();
    unsigned char* base = a.base + offset;
    if (pages > 0 && mprotect(base, pages * kPage, PROT_READ | PROT_WRITE) != 0)
        throw std::bad_alloc();
    a.used = offset + pages * kPage;
    if (bytes > 0) std::memset(base, 0xff, pages * kPage);
    a.live.emplace(base, DeviceBuffer{base, bytes, std::vector<Cell>(bytes)});
    return base;
}

void device_free(void* pointer) {
    if (pointer == nullptr) return;
    Arena& a = arena();
    const auto it = a.live.find(static_cast<const unsigned char*>(pointer));
    if (it == a.live.end())
        throw std::invalid_argument("free of what is not emulated device memory");
    const std::size_t pages = (it->second.bytes + kPage - 1) / kPage;
    if (pages > 0) {
        madvise(pointer, pages * kPage, MADV_DONTNEED);
        mprotect(pointer, pages * kPage, PROT_NONE);
    }
    a.last = nullptr;
    a.live.erase(it);
}

void copy_to_device(void* device, const void* host, std::size_t bytes) {
    if (bytes == 0) return;
    DeviceBuffer& buffer = buffer_of(device, bytes);
    std::memcpy(device, host, bytes);
    Cell initialised;
    initialised.written = kBeforeAnyLaunch;
    Cell* cells = buffer.cells.data() + (static_cast<unsigned char*>(device) - buffer.base);
    for (std::size_t i = 0; i < bytes; ++i) cells[i] = initialised;
}

void copy_from_device(void* host, const void* device, std::size_t bytes) {
    if (bytes == 0) return;
    buffer_of(device, bytes);
    std::memcpy(host, device, bytes);
}

}  // namespace emulator
