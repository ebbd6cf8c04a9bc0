#include "fastllm/build_info.hpp"

#include <pybind11/stl.h>

#include "binding.hpp"
#include "fastllm/cpu_isa.hpp"

namespace py = pybind11;

namespace {

py::object or_none(const std::string& text) {
    return text.empty() ? py::object(py::none()) : py::str(text);
}

}  // namespace

FASTLLM_BINDING(build_info) {
    m.def("version", [] { return fastllm::build_info().version; });
    m.def("features", [] {
        const auto info = fastllm::build_info();
        py::dict features;
        features["version"] = info.version;
        features["compiler"] = info.compiler;
        features["cuda"] = info.cuda;
        features["cuda_archs"] = info.cuda_archs;
        features["cuda_version"] = or_none(info.cuda_version);
        features["cutlass_version"] = or_none(info.cutlass_version);
        features["openmp"] = info.openmp;
        features["sanitized"] = info.sanitized;
        features["cpu_built"] = info.cpu_built;
        features["cpu_used"] = name_of(fastllm::cpu::current_isa());
        features["cpu_features"] = info.cpu_features;
        return features;
    });
}
