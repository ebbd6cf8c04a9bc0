#include <cstdlib>

#include "binding.hpp"

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace {

// glibc raises its threshold to the size of the largest block freed so far, up to 32 MiB; from then
// on huge blocks lie among small ones and stay with the process when they are freed. A threshold
// that is set stays as it is: larger blocks are mapped alone and go back at once. False where the C
// library has no such setting.
bool set_mmap_threshold([[maybe_unused]] int bytes) {
#if defined(__GLIBC__)
    return mallopt(M_MMAP_THRESHOLD, bytes) == 1;
#else
    return false;
#endif
}

// Whole pages of free memory go back to the system, also those between blocks that are in use,
// which glibc keeps otherwise. False where there was nothing to give, or the C library has no such
// call.
bool trim_heap() {
#if defined(__GLIBC__)
    return malloc_trim(0) == 1;
#else
    return false;
#endif
}

}  // namespace

FASTLLM_BINDING(heap) {
    m.def("set_mmap_threshold", &set_mmap_threshold, pybind11::arg("bytes"));
    m.def("trim_heap", &trim_heap);
}
