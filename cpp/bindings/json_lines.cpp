#include "fastllm/json_lines.hpp"

#include <pybind11/stl.h>

#include <optional>
#include <tuple>
#include <utility>

#include "binding.hpp"

namespace py = pybind11;

namespace {

// Validity bits (None: all rows have a value), offsets, data (None: all texts are empty), the first
// row, and whether offsets have 64 bits: what pyarrow's Array.buffers() and Array.offset say.
using Buffers =
    std::tuple<std::optional<py::buffer>, py::buffer, std::optional<py::buffer>, size_t, bool>;

struct Bytes {
    const void* begin = nullptr;
    size_t size = 0;
};

Bytes bytes_of(const std::optional<py::buffer>& buffer, std::vector<py::buffer_info>& held) {
    if (!buffer) return {};
    held.push_back(buffer->request());
    return {held.back().ptr, size_t(held.back().size * held.back().itemsize)};
}

py::bytes write_json_lines(const std::vector<std::string>& keys,
                           const std::vector<Buffers>& columns, size_t rows) {
    std::vector<py::buffer_info> held;
    std::vector<fastllm::StringColumn> views;
    for (const auto& [validity, offsets, data, first, wide] : columns) {
        const Bytes bits = bytes_of(validity, held);
        const Bytes ends = bytes_of(offsets, held);
        const Bytes text = bytes_of(data, held);
        fastllm::StringColumn view;
        view.validity = static_cast<const uint8_t*>(bits.begin);
        view.validity_bytes = bits.size;
        view.offsets = ends.begin;
        view.offsets_bytes = ends.size;
        view.data = static_cast<const char*>(text.begin);
        view.data_bytes = text.size;
        view.first = first;
        view.wide = wide;
        views.push_back(view);
    }
    std::optional<fastllm::JsonLines> lines;
    {
        const py::gil_scoped_release release;
        lines.emplace(keys, std::move(views), rows);
    }
    py::bytes result(static_cast<const char*>(nullptr), lines->size());
    char* const out = PyBytes_AS_STRING(result.ptr());
    {
        const py::gil_scoped_release release;
        lines->write(out);
    }
    return result;
}

}  // namespace

FASTLLM_BINDING(json_lines) {
    m.def("write_json_lines", &write_json_lines, py::arg("keys"), py::arg("columns"),
          py::arg("rows"));
}
