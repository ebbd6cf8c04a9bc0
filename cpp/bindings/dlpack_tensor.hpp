// Tensors that come from Python through DLPack, and the checks that operators make on them.
//
// Takes a capsule, or any object with __dlpack__(). The structures below are the C ABI that
// DLPack 1.x prescribes (https://dmlc.github.io/dlpack/latest/c_api.html); capsules named
// "dltensor" and "dltensor_versioned" are read.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "fastllm/dtype.hpp"

namespace fastllm::bindings {

enum class Device : std::int32_t { kCpu = 1, kCuda = 2 };

namespace dlpack {

struct Tensor {
    void* data;
    std::int32_t device_type;
    std::int32_t device_id;
    std::int32_t ndim;
    std::uint8_t type_code;
    std::uint8_t type_bits;
    std::uint16_t type_lanes;
    std::int64_t* shape;
    std::int64_t* strides;  // in elements; null means dense and row-major
    std::uint64_t byte_offset;
};

struct Managed {
    Tensor tensor;
    void* context;
    void (*deleter)(Managed*);
};

struct ManagedVersioned {
    std::uint32_t major;
    std::uint32_t minor;
    void* context;
    void (*deleter)(ManagedVersioned*);
    std::uint64_t flags;  // bit 0: read-only
    Tensor tensor;
};

}  // namespace dlpack

// One argument of an operator. Holds on to the tensor's memory for its own lifetime. Every check
// throws ValueError (TypeError for what is no tensor) with the operator's and the argument's name.
class DlpackTensor {
  public:
    DlpackTensor(const char* op, const char* name, pybind11::handle object);
    ~DlpackTensor();
    DlpackTensor(DlpackTensor&& other) noexcept;
    DlpackTensor(const DlpackTensor&) = delete;
    DlpackTensor& operator=(const DlpackTensor&) = delete;

    // For outputs. Large ones on the CPU are advised to take huge pages.
    const DlpackTensor& writable() const;
    // Of this element type, and aligned to its elements.
    const DlpackTensor& typed(DType dtype) const;
    const DlpackTensor& contiguous() const;  // dense and row-major
    const DlpackTensor& dense(DType dtype) const { return typed(dtype).contiguous(); }
    bool is_int16() const;
    const DlpackTensor& dense_int16() const;
    const DlpackTensor& dense_int64() const;
    const DlpackTensor& bytes() const;  // bool or uint8
    const DlpackTensor& shaped(const std::vector<std::int64_t>& shape) const;
    const DlpackTensor& holding(std::int64_t count) const;        // so many elements, in any shape
    const DlpackTensor& like(const DlpackTensor& other) const;    // same shape
    const DlpackTensor& beside(const DlpackTensor& other) const;  // same device

    DType dtype() const;  // throws for any but float32, bfloat16 and float16
    Device device() const;
    std::int32_t device_id() const { return tensor().device_id; }
    std::int32_t ndim() const { return tensor().ndim; }
    std::int64_t size(int dimension) const;    // negative: from the end
    std::int64_t stride(int dimension) const;  // in elements; negative dimension: from the end
    std::int64_t count() const;                // of elements
    std::vector<std::int64_t> shape() const;

    // Of shape (..., cols) with one column or more: the product of the rest, and cols.
    std::pair<std::int64_t, std::int64_t> rows_and_cols() const;

    void* data() const;
    // First byte and one past the last byte of the elements.
    std::pair<std::uintptr_t, std::uintptr_t> extent() const;
    template <class T>
    T* data_as() const {
        return static_cast<T*>(data());
    }

    [[noreturn]] void fail(const std::string& what) const;
    const char* name() const { return name_; }

  private:
    const DlpackTensor& aligned_to(std::size_t bytes) const;
    const dlpack::Tensor& tensor() const {
        return versioned_ != nullptr ? versioned_->tensor : plain_->tensor;
    }

    const char* op_;
    const char* name_;
    dlpack::Managed* plain_ = nullptr;
    dlpack::ManagedVersioned* versioned_ = nullptr;
};

using MaybeTensor = std::optional<DlpackTensor>;

// None is no tensor.
MaybeTensor optional_tensor(const char* op, const char* name, pybind11::handle object);

inline void* data_or_null(const MaybeTensor& tensor) { return tensor ? tensor->data() : nullptr; }

inline const DlpackTensor* pointer_or_null(const MaybeTensor& tensor) {
    return tensor ? &*tensor : nullptr;
}

// Throws when memory of an output overlaps that of an input or of another output, from first to
// last byte. Null pointers are skipped.
void require_disjoint(std::initializer_list<const DlpackTensor*> outputs,
                      std::initializer_list<const DlpackTensor*> inputs);

// For operators that may work in place: an output may be an input itself, with the same strides,
// but may not overlap it otherwise.
void require_same_or_disjoint(const DlpackTensor& output, const DlpackTensor& input);

// Throws for a shape that has no parts.
void require_parts_of(const char* op, std::int64_t rows, std::int64_t cols);
[[noreturn]] void refuse_cuda(const char* op);

// Throws when `tensor` is on a CUDA device and this build has no CUDA kernels.
void require_backend(const DlpackTensor& tensor);

}  // namespace fastllm::bindings

// Runs fastllm::cpu::function(args) or fastllm::cuda::function(args, stream), whichever holds
// `tensor`, without Python's lock. Needs fastllm/cuda_device.hpp; require_backend(tensor) first.
//
// FASTLLM_PARTS: function(rows, cols) of the same namespaces, for a device.
#if FASTLLM_WITH_CUDA
#define FASTLLM_PARTS(function, rows, cols, cuda, device_id)          \
    [&]() -> std::int64_t {                                           \
        ::fastllm::bindings::require_parts_of(#function, rows, cols); \
        if (!(cuda)) return ::fastllm::cpu::function(rows, cols);     \
        const ::fastllm::cuda::DeviceGuard guard(device_id);          \
        return ::fastllm::cuda::function(rows, cols);                 \
    }()
#define FASTLLM_RUN(tensor, function, args, stream)                           \
    do {                                                                      \
        ::pybind11::gil_scoped_release unlocked;                              \
        if ((tensor).device() == ::fastllm::bindings::Device::kCpu) {         \
            ::fastllm::cpu::function(args);                                   \
        } else {                                                              \
            const ::fastllm::cuda::DeviceGuard guard((tensor).device_id());   \
            ::fastllm::cuda::function(args, reinterpret_cast<void*>(stream)); \
        }                                                                     \
    } while (false)
#else
#define FASTLLM_PARTS(function, rows, cols, cuda, device_id)          \
    [&]() -> std::int64_t {                                           \
        ::fastllm::bindings::require_parts_of(#function, rows, cols); \
        (void)(device_id);                                            \
        if (cuda) ::fastllm::bindings::refuse_cuda(#function);        \
        return ::fastllm::cpu::function(rows, cols);                  \
    }()
#define FASTLLM_RUN(tensor, function, args, stream) \
    do {                                            \
        (void)(stream);                             \
        ::pybind11::gil_scoped_release unlocked;    \
        ::fastllm::cpu::function(args);             \
    } while (false)
#endif
