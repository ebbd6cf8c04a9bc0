#include "report.hpp"

#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <map>
#include <utility>

#include "block.hpp"
#include "emulator.hpp"

namespace emulator {
namespace {

constexpr int kSamples = 3;

std::vector<Report> kept;
std::map<std::pair<std::string, std::string>, int> samples;
std::size_t total = 0;
std::string kernel_name = "(no kernel)";

}  // namespace

const std::vector<Report>& reports() { return kept; }
std::size_t report_count() { return total; }

void clear_reports() {
    kept.clear();
    samples.clear();
    total = 0;
}

void begin_reports_of(const char* kernel) { kernel_name = kernel; }

void report(const char* kind, const char* format, ...) {
    ++total;
    if (++samples[{kernel_name, kind}] > kSamples) return;
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    char where[128];
    const ThreadView& t = current_thread();
    std::snprintf(where, sizeof where, "block (%u,%u,%u) thread (%u,%u,%u): ", t.block.x, t.block.y,
                  t.block.z, t.thread.x, t.thread.y, t.thread.z);
    kept.push_back({kind, kernel_name, where + std::string(text)});
}

std::string module_offset(const void* code) {
    Dl_info info;
    char text[32];
    auto address = reinterpret_cast<std::uintptr_t>(code);
    if (dladdr(code, &info) != 0) address -= reinterpret_cast<std::uintptr_t>(info.dli_fbase);
    std::snprintf(text, sizeof text, "+0x%zx", static_cast<std::size_t>(address));
    return text;
}

}  // namespace emulator
