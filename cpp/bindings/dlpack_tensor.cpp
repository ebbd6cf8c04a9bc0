#include "dlpack_tensor.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace py = pybind11;

namespace fastllm::bindings {
namespace {

// Codes of DLDataTypeCode.
constexpr std::uint8_t kInt = 0;
constexpr std::uint8_t kUint = 1;
constexpr std::uint8_t kFloat = 2;
constexpr std::uint8_t kBfloat = 4;
constexpr std::uint8_t kBool = 6;

std::string text_of(const std::vector<std::int64_t>& shape) {
    std::string text = "(";
    for (const std::int64_t size : shape) text += std::to_string(size) + ",";
    if (shape.size() > 1) text.pop_back();
    return text + ")";
}

// Asks for pages of 2 MiB: a fresh output then takes one page fault where it took 512, and what
// reads it finds its addresses translated. Advice, which the system may ignore, so errors do not
// matter.
void advise_huge_pages([[maybe_unused]] std::pair<std::uintptr_t, std::uintptr_t> extent) {
#if defined(__linux__)
    constexpr std::uintptr_t kPage = std::uintptr_t{2} << 20;
    constexpr std::uintptr_t kWorthACall = 4 * kPage;
    const std::uintptr_t begin = (extent.first + kPage - 1) / kPage * kPage;
    const std::uintptr_t end = extent.second / kPage * kPage;
    if (extent.second - extent.first < kWorthACall || end <= begin) return;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

std::string type_of(py::handle object) { return py::str(py::type::of(object).attr("__name__")); }

}  // namespace

DlpackTensor::DlpackTensor(const char* op, const char* name, py::handle object)
    : op_(op), name_(name) {
    py::object capsule = py::reinterpret_borrow<py::object>(object);
    if (!PyCapsule_CheckExact(object.ptr())) {
        if (!py::hasattr(object, "__dlpack__")) {
            throw py::type_error(std::string(op) + ": " + name + " is a " + type_of(object) +
                                 ", expected a tensor with __dlpack__");
        }
        capsule = object.attr("__dlpack__")();
    }
    PyObject* const p = capsule.ptr();
    if (PyCapsule_IsValid(p, "dltensor")) {
        plain_ = static_cast<dlpack::Managed*>(PyCapsule_GetPointer(p, "dltensor"));
        PyCapsule_SetName(p, "used_dltensor");
    } else if (PyCapsule_IsValid(p, "dltensor_versioned")) {
        auto* versioned =
            static_cast<dlpack::ManagedVersioned*>(PyCapsule_GetPointer(p, "dltensor_versioned"));
        if (versioned->major != 1) fail("is a DLPack tensor of an unknown major version");
        versioned_ = versioned;
        PyCapsule_SetName(p, "used_dltensor_versioned");
    } else {
        throw py::type_error(std::string(op) + ": " + name + " is not an unused DLPack capsule");
    }
    if (tensor().device_type != static_cast<std::int32_t>(Device::kCpu) &&
        tensor().device_type != static_cast<std::int32_t>(Device::kCuda)) {
        fail("is on DLPack device type " + std::to_string(tensor().device_type) +
             ", expected CPU or CUDA");
    }
}

DlpackTensor::DlpackTensor(DlpackTensor&& other) noexcept
    : op_(other.op_), name_(other.name_), plain_(other.plain_), versioned_(other.versioned_) {
    other.plain_ = nullptr;
    other.versioned_ = nullptr;
}

DlpackTensor::~DlpackTensor() {
    if (plain_ != nullptr && plain_->deleter != nullptr) plain_->deleter(plain_);
    if (versioned_ != nullptr && versioned_->deleter != nullptr) versioned_->deleter(versioned_);
}

void DlpackTensor::fail(const std::string& what) const {
    throw py::value_error(std::string(op_) + ": " + name_ + " " + what);
}

Device DlpackTensor::device() const { return static_cast<Device>(tensor().device_type); }

std::int64_t DlpackTensor::size(int dimension) const {
    return tensor().shape[dimension < 0 ? dimension + tensor().ndim : dimension];
}

std::int64_t DlpackTensor::count() const {
    std::int64_t product = 1;
    for (int i = 0; i < tensor().ndim; ++i) product *= tensor().shape[i];
    return product;
}

std::pair<std::int64_t, std::int64_t> DlpackTensor::rows_and_cols() const {
    if (ndim() < 1 || size(-1) < 1) fail("has no columns, expected shape (..., cols)");
    return {count() / size(-1), size(-1)};
}

std::vector<std::int64_t> DlpackTensor::shape() const {
    return {tensor().shape, tensor().shape + tensor().ndim};
}

void* DlpackTensor::data() const {
    return static_cast<unsigned char*>(tensor().data) + tensor().byte_offset;
}

DType DlpackTensor::dtype() const {
    const dlpack::Tensor& t = tensor();
    if (t.type_lanes == 1) {
        if (t.type_code == kFloat && t.type_bits == 32) return DType::kFloat32;
        if (t.type_code == kBfloat && t.type_bits == 16) return DType::kBFloat16;
        if (t.type_code == kFloat && t.type_bits == 16) return DType::kFloat16;
    }
    fail("has DLPack type code " + std::to_string(t.type_code) + " with " +
         std::to_string(t.type_bits) + " bits, expected float32, bfloat16 or float16");
}

const DlpackTensor& DlpackTensor::writable() const {
    if (versioned_ != nullptr && (versioned_->flags & 1) != 0) fail("is read-only");
    if (device() == Device::kCpu) advise_huge_pages(extent());
    return *this;
}

const DlpackTensor& DlpackTensor::typed(DType expected) const {
    if (dtype() != expected) {
        fail(std::string("is ") + name_of(dtype()) + ", expected " + name_of(expected));
    }
    return aligned_to(size_in_bytes(expected));
}

const DlpackTensor& DlpackTensor::aligned_to(std::size_t bytes) const {
    if (reinterpret_cast<std::uintptr_t>(data()) % bytes != 0) {
        fail("is not aligned to its element size");
    }
    return *this;
}

const DlpackTensor& DlpackTensor::contiguous() const {
    std::int64_t expected = 1;
    for (int i = ndim() - 1; i >= 0 && count() > 0; --i) {
        if (size(i) != 1 && stride(i) != expected) fail("is not contiguous");
        expected *= size(i);
    }
    return *this;
}

bool DlpackTensor::is_int16() const {
    const dlpack::Tensor& t = tensor();
    return t.type_lanes == 1 && t.type_code == kInt && t.type_bits == 16;
}

const DlpackTensor& DlpackTensor::dense_int16() const {
    if (!is_int16()) fail("is not int16");
    return aligned_to(sizeof(std::int16_t)).contiguous();
}

const DlpackTensor& DlpackTensor::dense_int64() const {
    const dlpack::Tensor& t = tensor();
    if (t.type_lanes != 1 || t.type_code != kInt || t.type_bits != 64) fail("is not int64");
    return aligned_to(sizeof(std::int64_t)).contiguous();
}

const DlpackTensor& DlpackTensor::bytes() const {
    const dlpack::Tensor& t = tensor();
    if (t.type_lanes != 1 || t.type_bits != 8 || (t.type_code != kUint && t.type_code != kBool)) {
        fail("is not bool or uint8");
    }
    return *this;
}

std::int64_t DlpackTensor::stride(int dimension) const {
    const int index = dimension < 0 ? dimension + ndim() : dimension;
    if (tensor().strides != nullptr) return tensor().strides[index];
    std::int64_t product = 1;
    for (int i = ndim() - 1; i > index; --i) product *= size(i);
    return product;
}

std::pair<std::uintptr_t, std::uintptr_t> DlpackTensor::extent() const {
    const auto base = reinterpret_cast<std::uintptr_t>(data());
    if (count() == 0) return {base, base};
    std::int64_t first = 0;
    std::int64_t last = 0;
    for (int i = 0; i < ndim(); ++i) {
        const std::int64_t reach = (size(i) - 1) * stride(i);
        (reach < 0 ? first : last) += reach;
    }
    const std::int64_t bytes = tensor().type_bits / 8;
    return {base + first * bytes, base + (last + 1) * bytes};
}

const DlpackTensor& DlpackTensor::shaped(const std::vector<std::int64_t>& expected) const {
    if (shape() != expected) {
        fail("has shape " + text_of(shape()) + ", expected " + text_of(expected));
    }
    return *this;
}

const DlpackTensor& DlpackTensor::holding(std::int64_t expected) const {
    if (count() != expected) {
        fail("has shape " + text_of(shape()) + ", expected " + std::to_string(expected) +
             " elements");
    }
    return *this;
}

const DlpackTensor& DlpackTensor::like(const DlpackTensor& other) const {
    return shaped(other.shape());
}

const DlpackTensor& DlpackTensor::beside(const DlpackTensor& other) const {
    if (device() != other.device() || device_id() != other.device_id()) {
        fail(std::string("is on another device than ") + other.name_);
    }
    return *this;
}

MaybeTensor optional_tensor(const char* op, const char* name, py::handle object) {
    if (object.is_none()) return std::nullopt;
    return DlpackTensor(op, name, object);
}

namespace {

void require_disjoint(const DlpackTensor& output, const DlpackTensor& other) {
    const auto [begin, end] = output.extent();
    const auto [other_begin, other_end] = other.extent();
    if (begin < other_end && other_begin < end) {
        output.fail(std::string("overlaps ") + other.name());
    }
}

}  // namespace

void require_disjoint(std::initializer_list<const DlpackTensor*> outputs,
                      std::initializer_list<const DlpackTensor*> inputs) {
    for (auto output = outputs.begin(); output != outputs.end(); ++output) {
        if (*output == nullptr) continue;
        for (const DlpackTensor* input : inputs) {
            if (input != nullptr) require_disjoint(**output, *input);
        }
        for (auto other = outputs.begin(); other != output; ++other) {
            if (*other != nullptr) require_disjoint(**output, **other);
        }
    }
}

void require_same_or_disjoint(const DlpackTensor& output, const DlpackTensor& input) {
    bool same = output.data() == input.data() && output.shape() == input.shape();
    for (int i = 0; same && i < output.ndim(); ++i) {
        same = output.size(i) == 1 || output.stride(i) == input.stride(i);
    }
    if (!same) require_disjoint(output, input);
}

void require_parts_of(const char* op, std::int64_t rows, std::int64_t cols) {
    if (rows < 0 || cols < 1) {
        throw py::value_error(std::string(op) + ": expected rows >= 0 and cols >= 1");
    }
}

void refuse_cuda(const char* op) {
    throw py::value_error(std::string(op) + ": fastllm_core was built without CUDA kernels");
}

void require_backend([[maybe_unused]] const DlpackTensor& tensor) {
#if !FASTLLM_WITH_CUDA
    if (tensor.device() == Device::kCuda) {
        tensor.fail(
            "is on a CUDA device, but fastllm_core was built without CUDA kernels "
            "(reinstall with FASTLLM_CUDA=ON)");
    }
#endif
}

}  // namespace fastllm::bindings
