// Collecting what the checker finds.
#pragma once

#include <string>

namespace emulator {

// Adds a report for the running kernel, block and thread. printf-style.
void report(const char* kind, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Names the kernel that the following reports are about.
void begin_reports_of(const char* kernel);

// "+0x1234": an offset into the module that holds this code address, for addr2line.
std::string module_offset(const void* code);

}  // namespace emulator
