// Memory accesses of device code: checked against the shadow, and counted.
#pragma once

#include <cstddef>
#include <cstdint>

#include "shadow.hpp"

namespace emulator {

// Called before the access happens. `site` is the code address it comes from. Of other
// addresses (a thread's own variables, arguments, static data) it is checked only that they exist.
void access(const void* p, std::size_t bytes, Access kind, const void* site);

// For transactions.cpp: `offset` is an address within global or shared memory.
void record_transaction(bool shared, std::uint64_t offset, std::size_t bytes, const void* site);

// Counts what the finished block recorded.
void finish_transactions();

}  // namespace emulator
