// fastllm_core's bindings over emulated device memory, and the emulator's own controls, for
// tests/ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>

#include "binding.hpp"
#include "dlpack_tensor.hpp"
#include "emulator.hpp"

namespace py = pybind11;

namespace {

namespace dlpack = fastllm::bindings::dlpack;

// An element type by the name that torch and numpy give it; codes are those of DLDataTypeCode.
struct ElementType {
    const char* name;
    std::uint8_t code;
    std::uint8_t bits;
};
constexpr ElementType kElementTypes[] = {{"float32", 2, 32}, {"bfloat16", 4, 16},
                                         {"float16", 2, 16}, {"int16", 0, 16},
                                         {"int64", 0, 64},   {"bool", 6, 8}};

ElementType element_type(const std::string& name) {
    for (const ElementType& type : kElementTypes) {
        if (name == type.name) return type;
    }
    throw py::value_error("no element type " + name);
}

// A tensor in emulated device memory, `offset` elements into its buffer.
class DeviceArray {
  public:
    DeviceArray(std::vector<std::int64_t> shape, const std::string& dtype, std::int64_t offset)
        : shape_(std::move(shape)), type_(element_type(dtype)) {
        std::size_t count = 1;
        for (const std::int64_t size : shape_) count *= static_cast<std::size_t>(size);
        bytes_ = count * type_.bits / 8;
        const std::size_t before = static_cast<std::size_t>(offset) * type_.bits / 8;
        base_ = static_cast<unsigned char*>(emulator::device_malloc(before + bytes_));
        data_ = base_ + before;
    }
    ~DeviceArray() { emulator::device_free(base_); }
    DeviceArray(const DeviceArray&) = delete;
    DeviceArray& operator=(const DeviceArray&) = delete;

    void upload(const py::buffer& source) {
        const py::buffer_info info = source.request();
        require_bytes(static_cast<std::size_t>(info.size * info.itemsize));
        emulator::copy_to_device(data_, info.ptr, bytes_);
    }

    void download(const py::buffer& target) const {
        const py::buffer_info info = target.request(true);
        require_bytes(static_cast<std::size_t>(info.size * info.itemsize));
        emulator::copy_from_device(info.ptr, data_, bytes_);
    }

    std::uintptr_t pointer() const { return reinterpret_cast<std::uintptr_t>(data_); }

    py::capsule dlpack() {
        auto* managed = new Managed{{}, shape_};
        dlpack::Tensor& t = managed->base.tensor;
        t.data = data_;
        t.device_type = static_cast<std::int32_t>(fastllm::bindings::Device::kCuda);
        t.ndim = static_cast<std::int32_t>(managed->shape.size());
        t.type_code = type_.code;
        t.type_bits = type_.bits;
        t.type_lanes = 1;
        t.shape = managed->shape.data();
        managed->base.context = managed;
        managed->base.deleter = [](dlpack::Managed* m) {
            delete static_cast<Managed*>(m->context);
        };
        return py::capsule(&managed->base, "dltensor", [](PyObject* object) {
            if (!PyCapsule_IsValid(object, "dltensor")) return;  // taken over by a consumer
            auto* m = static_cast<dlpack::Managed*>(PyCapsule_GetPointer(object, "dltensor"));
            m->deleter(m);
        });
    }

  private:
    struct Managed {
        dlpack::Managed base;
        std::vector<std::int64_t> shape;
    };

    void require_bytes(std::size_t bytes) const {
        if (bytes != bytes_) throw py::value_error("the buffer has another size than the array");
    }

    std::vector<std::int64_t> shape_;
    ElementType type_;
    std::size_t bytes_ = 0;
    unsigned char* base_ = nullptr;
    unsigned char* data_ = nullptr;
};

py::dict counters() {
    const emulator::Counters& c = emulator::counters();
    py::dict d;
    d["read_bytes"] = c.read_bytes;
    d["written_bytes"] = c.written_bytes;
    d["unique_read_bytes"] = c.unique_read_bytes;
    d["unique_written_bytes"] = c.unique_written_bytes;
    d["sectors"] = c.sectors;
    d["min_sectors"] = c.min_sectors;
    d["wavefronts"] = c.wavefronts;
    d["min_wavefronts"] = c.min_wavefronts;
    d["barriers"] = c.barriers;
    d["warp_operations"] = c.warp_operations;
    d["threads"] = c.threads;
    return d;
}

}  // namespace

// The PTX emulator's own controls, in ptx_module.cpp where they are linked.
void bind_ptx(py::module_& m) __attribute__((weak));

PYBIND11_MODULE(FASTLLM_EMULATED_MODULE, m) {
    if (bind_ptx != nullptr) bind_ptx(m);
    m.doc() = "fastllm_core's operators on an emulated CUDA device. Tests only.";
    for (const auto bind : fastllm::bindings::binders()) bind(m);

    py::class_<DeviceArray>(m, "DeviceArray", py::module_local())
        .def(py::init<std::vector<std::int64_t>, std::string, std::int64_t>(), py::arg("shape"),
             py::arg("dtype"), py::arg("offset") = 0)
        .def("upload", &DeviceArray::upload)
        .def("download", &DeviceArray::download)
        .def("pointer", [](const DeviceArray& a) { return a.pointer(); })
        .def("__dlpack__", &DeviceArray::dlpack);
    m.def(
        "set_options",
        [](unsigned schedule, bool count_transactions, bool check, int multiprocessors,
           int capability) {
            emulator::options() = {schedule, count_transactions, check, multiprocessors,
                                   capability};
        },
        py::arg("schedule") = 0, py::arg("count_transactions") = false, py::arg("check") = true,
        py::arg("multiprocessors") = 4, py::arg("capability") = 80);
    m.def("counters", &counters);
    m.def("clear_counters", &emulator::clear_counters);
    m.def("reports", [] {
        py::list list;
        for (const emulator::Report& r : emulator::reports()) {
            list.append(py::make_tuple(r.kind, r.kernel, r.text));
        }
        return list;
    });
    m.def("report_count", &emulator::report_count);
    m.def("clear_reports", &emulator::clear_reports);
}
