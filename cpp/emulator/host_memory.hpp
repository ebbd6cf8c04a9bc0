// Memory of the test's own process, which device code of the source emulator shares with it.
#pragma once

#include <cstddef>

namespace emulator {

// Whether these bytes can be read without a fault: arguments and static data can, a pointer gone
// astray most likely cannot.
bool is_mapped(const void* p, std::size_t bytes);

}  // namespace emulator
