// cuTensorMapEncodeTiled, which host code finds through cudaGetDriverEntryPoint.
#include "ptx_tensor_map.hpp"

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>

namespace {

using emulator::ptx::TensorMap;

unsigned bytes_of(CUtensorMapDataType type) {
    switch (type) {
        case CU_TENSOR_MAP_DATA_TYPE_UINT8:
            return 1;
        case CU_TENSOR_MAP_DATA_TYPE_UINT16:
        case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
        case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
            return 2;
        case CU_TENSOR_MAP_DATA_TYPE_UINT32:
        case CU_TENSOR_MAP_DATA_TYPE_INT32:
        case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
            return 4;
        default:
            return 0;
    }
}

// With the limits that the driver API documents.
CUresult encode(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* address,
                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
    TensorMap map{};
    map.magic = TensorMap::kMagic;
    map.address = reinterpret_cast<std::uint64_t>(address);
    map.rank = static_cast<std::uint8_t>(rank);
    map.element_bytes = static_cast<std::uint8_t>(bytes_of(type));
    if (map.element_bytes == 0 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
        fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) {
        return CUDA_ERROR_NOT_SUPPORTED;
    }
    switch (swizzle) {
        case CU_TENSOR_MAP_SWIZZLE_NONE:
            break;
        case CU_TENSOR_MAP_SWIZZLE_32B:
            map.swizzle_bytes = 32;
            break;
        case CU_TENSOR_MAP_SWIZZLE_64B:
            map.swizzle_bytes = 64;
            break;
        case CU_TENSOR_MAP_SWIZZLE_128B:
            map.swizzle_bytes = 128;
            break;
        default:
            return CUDA_ERROR_NOT_SUPPORTED;
    }
    if (rank < 1 || rank > 5 || map.address % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
    for (cuuint32_t d = 0; d < rank; ++d) {
        if (sizes[d] == 0 || sizes[d] > (std::uint64_t{1} << 32) || box[d] == 0 || box[d] > 256 ||
            element_strides[d] != 1) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        map.size[d] = static_cast<std::uint32_t>(sizes[d]);
        map.box[d] = static_cast<std::uint16_t>(box[d]);
        if (d == 0) continue;
        if (strides[d - 1] % 16 != 0 || strides[d - 1] >= TensorMap::kMostStride) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        map.stride[d - 1] = strides[d - 1];
    }
    const unsigned row = box[0] * map.element_bytes;
    if (row % 16 != 0 || (map.swizzle_bytes != 0 && row > map.swizzle_bytes)) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    std::memcpy(out, &map, sizeof map);
    return CUDA_SUCCESS;
}

cudaError_t find(const char* symbol, void** function, cudaDriverEntryPointQueryResult* result) {
    const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
    *function = known ? reinterpret_cast<void*>(&encode) : nullptr;
    if (result != nullptr) {
        *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    }
    return known ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace

extern "C" {

cudaError_t cudaGetDriverEntryPoint(const char* symbol, void** function, unsigned long long,
                                    cudaDriverEntryPointQueryResult* result) {
    return find(symbol, function, result);
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
    return find(symbol, function, result);
}
}
