// Memory for large tables that are read at random places.
//
// With small pages most look-ups miss the TLB, and on some processors even a prefetch then waits
// for the page walk: half of the time of finding chunks in a 16 MiB cache.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <new>
#include <vector>

namespace fastllm {

// Asks for huge pages; where the system has none to give, memory is as usual.
template <class T>
struct HugePageAllocator {
    using value_type = T;
    static constexpr size_t kHugePage = size_t(2) << 20;
    static constexpr size_t kLine = 64;  // of the processor's cache

    HugePageAllocator() = default;
    template <class U>
    HugePageAllocator(const HugePageAllocator<U>&) {}

    T* allocate(size_t count) {
        const size_t bytes = count * sizeof(T);
        if (bytes < kHugePage)
            return static_cast<T*>(::operator new(bytes, std::align_val_t(kLine)));
        const size_t whole = (bytes + kHugePage - 1) / kHugePage * kHugePage;
        void* const memory = std::aligned_alloc(kHugePage, whole);
        if (!memory) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
        ::madvise(memory, whole, MADV_HUGEPAGE);
#endif
        return static_cast<T*>(memory);
    }
    void deallocate(T* memory, size_t count) {
        if (count * sizeof(T) < kHugePage)
            ::operator delete(memory, std::align_val_t(kLine));
        else
            std::free(memory);
    }
    friend bool operator==(const HugePageAllocator&, const HugePageAllocator&) { return true; }
    friend bool operator!=(const HugePageAllocator&, const HugePageAllocator&) { return false; }
};

template <class T>
using HugePageVector = std::vector<T, HugePageAllocator<T>>;

}  // namespace fastllm
