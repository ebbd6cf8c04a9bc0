// The part of the CUDA runtime that launchers call.
#include <cuda_runtime.h>

#include "emulator.hpp"

namespace {

cudaError_t last_error = cudaSuccess;

}  // namespace

namespace emulator {

void set_last_error(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
}

}  // namespace emulator

extern "C" {

cudaError_t cudaGetLastError() {
    const cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrMultiProcessorCount:
            *value = emulator::options().multiprocessors;
            return cudaSuccess;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin:
            *value = static_cast<int>(emulator::most_shared_memory());
            return cudaSuccess;
        case cudaDevAttrComputeCapabilityMajor:
            *value = emulator::options().capability / 10;
            return cudaSuccess;
        case cudaDevAttrComputeCapabilityMinor:
            *value = emulator::options().capability % 10;
            return cudaSuccess;
        default:
            return cudaErrorInvalidValue;
    }
}

const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorLaunchFailure ? "the emulator abandoned the launch, see its reports"
                                           : "emulated CUDA error";
}
}
