// Runs the PTX that nvcc emits, under the same checker as the sources (emulator.hpp). Tests only.
//
// Host code compiled by nvcc, with its PTX embedded (-gencode arch=compute_80,code=compute_80
// --no-compress), is linked to ptx_cudart.cpp in place of the CUDA runtime: its launches arrive
// here.
//
// Further kinds of report: async-copy (shared memory that a copy is still to write is touched, or
// nothing waits for a copy), proxy-fence (ordinary and asynchronous accesses without a fence
// between), mbarrier, bulk-copy, wgmma (these used against their rules), trap, ptx (an instruction
// that is not emulated, by line).
//
// Limits, beside those of emulator.hpp: one block at a time; mma.sync and wgmma of 16-bit floats
// into float32 only, wgmma of swizzled operands along k; clusters of one block; no textures, calls
// of functions; .ftz keeps denormals.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <string>
#include <vector>

namespace emulator::ptx {

// Makes a module's kernels known; those of the same name are replaced. Throws Unsupported.
void load_module(const std::string& text);

// Names of all kernels, mangled.
std::vector<std::string> kernel_names();

// Text of the module that a kernel is in. Throws std::out_of_range.
const std::string& module_text(const std::string& kernel);

// Lines of the module's text that launches of this kernel have executed, ascending. Throws
// std::out_of_range.
std::vector<int> reached_lines(const std::string& kernel);

// `arguments[i]` points to the i-th parameter. Returns false, with a report made, when the launch
// could not be completed.
bool launch(const std::string& kernel, dim3 grid, dim3 block, std::size_t dynamic_shared,
            const void* const* arguments);

// Bytes of each parameter. Throws std::out_of_range.
std::vector<std::size_t> parameter_bytes(const std::string& kernel);

}  // namespace emulator::ptx
