#include "fastllm/packing.hpp"

#include <pybind11/numpy.h>

#include "binding.hpp"

namespace py = pybind11;

namespace {

py::array_t<int64_t> as_array(const std::vector<int64_t>& values) {
    return py::array_t<int64_t>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::tuple pack_best_fit(
    const py::array_t<int32_t, py::array::c_style | py::array::forcecast>& lengths,
    int32_t capacity) {
    if (lengths.ndim() != 1) throw std::invalid_argument("lengths must have one dimension");
    const int32_t* const from = lengths.data();
    const auto count = size_t(lengths.size());
    fastllm::Packing packing;
    {
        const py::gil_scoped_release release;
        packing = fastllm::pack_best_fit(from, count, capacity);
    }
    return py::make_tuple(as_array(packing.items), as_array(packing.ends));
}

}  // namespace

FASTLLM_BINDING(packing) {
    m.def("pack_best_fit", &pack_best_fit, py::arg("lengths"), py::arg("capacity"));
}
