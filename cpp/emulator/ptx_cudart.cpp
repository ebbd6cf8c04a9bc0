// What host code compiled by nvcc calls to register its kernels and to launch them, as declared by
// CUDA's crt/host_runtime.h; the rest of the runtime is in cudart.cpp.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

#include "emulator.hpp"
#include "ptx.hpp"
#include "report.hpp"

namespace {

struct Function {
    std::string name;
    std::size_t most_dynamic_shared = 48 << 10;
};

std::map<const void*, Function>& functions() {
    static std::map<const void*, Function> all;
    return all;
}

// A fat binary is a header and entries one after another, each with a header of its own; text is
// where an entry is of the kind PTX and not compressed.
void load_fat_binary(const unsigned char* data) {
    constexpr std::uint32_t kMagic = 0xba55ed50u;
    constexpr std::uint16_t kPtx = 1;
    const auto read = [](const unsigned char* p, auto& value) {
        std::memcpy(&value, p, sizeof value);
    };
    std::uint32_t magic = 0;
    std::uint16_t header = 0;
    std::uint64_t size = 0;
    read(data, magic);
    read(data + 6, header);
    read(data + 8, size);
    if (magic != kMagic) return;
    for (const unsigned char* entry = data + header; entry < data + header + size;) {
        std::uint16_t kind = 0;
        std::uint32_t entry_header = 0;
        std::uint64_t entry_size = 0;
        read(entry, kind);
        read(entry + 4, entry_header);
        read(entry + 8, entry_size);
        std::string text(reinterpret_cast<const char*>(entry) + entry_header, entry_size);
        while (!text.empty() && text.back() == '\0') text.pop_back();
        if (kind == kPtx && text.find(".version") != text.npos) {
            try {
                emulator::ptx::load_module(text);
            } catch (const std::exception& error) {
                // In a static constructor there is nobody to catch it; the launch reports that the
                // kernel is missing.
                std::fprintf(stderr, "emulator: %s\n", error.what());
            }
        }
        entry += entry_header + entry_size;
    }
}

struct Configuration {
    dim3 grid;
    dim3 block;
    std::size_t shared = 0;
    void* stream = nullptr;
} configuration;

cudaError_t launch(const Function& function, dim3 grid, dim3 block, void** arguments,
                   std::size_t shared) {
    if (shared > function.most_dynamic_shared) {
        emulator::begin_reports_of(function.name.c_str());
        emulator::report("launch",
                         "%zu bytes of dynamic shared memory, cudaFuncSetAttribute allows %zu",
                         shared, function.most_dynamic_shared);
        emulator::set_last_error(cudaErrorInvalidValue);
        return cudaErrorInvalidValue;
    }
    const bool ok = emulator::ptx::launch(function.name, grid, block, shared, arguments);
    const cudaError_t status = ok ? cudaSuccess : cudaErrorLaunchFailure;
    emulator::set_last_error(status);
    return status;
}

}  // namespace

extern "C" {

struct FatBinaryWrapper {
    std::uint32_t magic;
    std::uint32_t version;
    const unsigned char* data;
    void* unused;
};

void** __cudaRegisterFatBinary(void* wrapper) {
    static void* handle = nullptr;
    load_fat_binary(static_cast<const FatBinaryWrapper*>(wrapper)->data);
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }

void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
    functions()[host].name = name;
}

void __cudaRegisterVar(void**, char*, char*, const char*, int, std::size_t, int, int) {}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, std::size_t shared, void* stream) {
    configuration = {grid, block, shared, stream};
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, std::size_t* shared, void* stream) {
    *grid = configuration.grid;
    *block = configuration.block;
    *shared = configuration.shared;
    std::memcpy(stream, &configuration.stream, sizeof configuration.stream);
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
    *kernel = reinterpret_cast<cudaKernel_t>(&functions()[host]);
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               std::size_t shared, cudaStream_t) {
    return launch(*reinterpret_cast<Function*>(kernel), grid, block, arguments, shared);
}

cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments,
                             std::size_t shared, cudaStream_t) {
    return launch(functions()[host], grid, block, arguments, shared);
}

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorInvalidValue;
    if (value < 0 || static_cast<std::size_t>(value) > emulator::most_shared_memory()) {
        return cudaErrorInvalidValue;
    }
    functions()[host].most_dynamic_shared = static_cast<std::size_t>(value);
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int,
                                                          std::size_t) {
    *blocks = 1;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int,
                                                                   std::size_t, unsigned) {
    *blocks = 1;
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
    if (kind != cudaMemcpyHostToDevice) return cudaErrorInvalidMemcpyDirection;
    emulator::copy_to_device(to, from, bytes);
    return cudaSuccess;
}

// Only for the workspaces of split products, which no instance here has.
cudaError_t cudaMemsetAsync(void*, int, std::size_t, cudaStream_t) { return cudaErrorNotSupported; }
}
