#include "fastllm/build_info.hpp"

#include <pybind11/stl.h>

#include "binding.hpp"

namespace py = pybind11;

FASTLLM_BINDING(build_info) {
    m.def("version", [] { return fastllm::build_info().version; });
    m.def("features", [] {
        const auto info = fastllm::build_info();
        py::dict features;
        features["version"] = info.version;
        features["compiler"] = info.compiler;
        features["cuda"] = info.cuda;
        features["cuda_archs"] = info.cuda_archs;
        features["openmp"] = info.openmp;
        features["sanitized"] = info.sanitized;
        features["cpu_features"] = info.cpu_features;
        return features;
    });
}
