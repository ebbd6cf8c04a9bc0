// Modules and launches.
#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>

#include "block.hpp"
#include "emulator.hpp"
#include "ptx.hpp"
#include "ptx_machine.hpp"
#include "report.hpp"

namespace emulator::ptx {
namespace {

struct Entry {
    const Module* module = nullptr;
    const Kernel* kernel = nullptr;
    std::unique_ptr<Program> program;  // decoded at the first launch
    std::string short_name;
};

// Static constructors of nvcc's objects register modules, so these are made on first use.
std::map<std::string, Entry>& entries() {
    static std::map<std::string, Entry> all;
    return all;
}

std::vector<std::unique_ptr<Module>>& modules() {
    static std::vector<std::unique_ptr<Module>> all;
    return all;
}

// "rmsnorm_fwd_kernel<float, 4>" for the symbol of that kernel.
std::string short_name(const std::string& mangled) {
    int status = 0;
    char* full = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
    std::string name = status == 0 ? full : mangled;
    std::free(full);
    if (name.rfind("void ", 0) == 0) name.erase(0, 5);
    int depth = 0;
    for (std::size_t i = 0; i < name.size(); ++i) {
        depth += (name[i] == '<') - (name[i] == '>');
        if (name[i] == '(' && depth == 0) {
            name.resize(i);
            break;
        }
    }
    const std::string ours = "fastllm::cuda::";
    if (name.rfind(ours, 0) == 0) name.erase(0, ours.size());
    if (name.size() > 120) name.resize(120);
    return name;
}

bool valid(const Launch& launch, const Kernel& kernel) {
    const std::size_t most_shared = most_shared_memory();
    const dim3& grid = launch.grid;
    const dim3& block = launch.block;
    const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
    if (threads < 1 || threads > kernel.max_threads || block.z > 64 || grid.x < 1 || grid.y < 1 ||
        grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
        report("launch", "grid (%u,%u,%u) of blocks (%u,%u,%u), of at most %u threads", grid.x,
               grid.y, grid.z, block.x, block.y, block.z, kernel.max_threads);
        return false;
    }
    if (kernel.required_threads != 0 && threads != kernel.required_threads) {
        report("launch", "%u threads, the kernel requires %u", static_cast<unsigned>(threads),
               kernel.required_threads);
        return false;
    }
    if (launch.program->shared_bytes + launch.dynamic_shared > most_shared) {
        report("launch", "%zu bytes of shared memory",
               launch.program->shared_bytes + launch.dynamic_shared);
        return false;
    }
    return true;
}

std::vector<std::uint32_t> block_order(std::uint64_t blocks) {
    std::vector<std::uint32_t> order(blocks);
    std::iota(order.begin(), order.end(), 0u);
    if (options().schedule == 1) std::reverse(order.begin(), order.end());
    if (options().schedule > 1) {
        std::shuffle(order.begin(), order.end(), std::mt19937(options().schedule));
    }
    return order;
}

}  // namespace

void load_module(const std::string& text) {
    std::unique_ptr<Module> module = parse(text);
    for (Variable& v : module->variables) {
        void* memory = device_malloc(v.bytes);
        copy_to_device(memory, v.initial.data(), v.bytes);
        v.offset = reinterpret_cast<std::size_t>(memory);
    }
    for (const auto& kernel : module->kernels) {
        entries()[kernel->name] = {module.get(), kernel.get(), nullptr, short_name(kernel->name)};
    }
    modules().push_back(std::move(module));  // kept: static constructors may hold its names
}

std::vector<std::string> kernel_names() {
    std::vector<std::string> names;
    for (const auto& [name, entry] : entries()) names.push_back(name);
    return names;
}

const std::string& module_text(const std::string& kernel) {
    return entries().at(kernel).module->text;
}

std::vector<int> reached_lines(const std::string& kernel) {
    std::vector<int> lines;
    const Entry& entry = entries().at(kernel);
    if (!entry.program) return lines;  // never launched
    for (std::size_t i = 0; i < entry.program->code.size(); ++i) {
        const int line = entry.program->code[i].line;
        if (entry.program->reached[i] != 0 && line > 0) lines.push_back(line);
    }
    std::sort(lines.begin(), lines.end());
    return lines;
}

std::vector<std::size_t> parameter_bytes(const std::string& kernel) {
    std::vector<std::size_t> bytes;
    for (const Variable& v : entries().at(kernel).kernel->params) bytes.push_back(v.bytes);
    return bytes;
}

bool launch(const std::string& name, dim3 grid, dim3 block, std::size_t dynamic_shared,
            const void* const* arguments) {
    current_thread() = ThreadView{};
    const auto found = entries().find(name);
    if (found == entries().end()) {
        begin_reports_of(short_name(name).c_str());
        report("ptx", "no PTX of this kernel; was it compiled with --no-compress?");
        return false;
    }
    Entry& entry = found->second;
    begin_reports_of(entry.short_name.c_str());
    try {
        if (!entry.program) entry.program = decode(*entry.kernel, *entry.module);
    } catch (const Unsupported& error) {
        report("ptx", "%s", error.what());
        return false;
    }
    Launch launch{entry.program.get(), grid, block, dynamic_shared, {}};
    if (!valid(launch, *entry.kernel)) return false;
    launch.params.resize(entry.kernel->param_bytes);
    for (std::size_t i = 0; i < entry.kernel->params.size(); ++i) {
        const Variable& v = entry.kernel->params[i];
        std::memcpy(launch.params.data() + v.offset, arguments[i], v.bytes);
    }
    begin_launch();
    const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
    counters().threads += blocks * block.x * block.y * block.z;
    Block runner(launch);
    for (const std::uint32_t b : block_order(blocks)) {
        if (!runner.run({b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)})) return false;
    }
    return true;
}

}  // namespace emulator::ptx
