// Controls of the PTX emulator, for tests: the kernels' text, other text in its place, launches of
// kernels that no host code launches, tensor maps for them.
#include <cuda.h>
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <vector>

#include "dlpack_tensor.hpp"
#include "ptx.hpp"
#include "ptx_program.hpp"

namespace py = pybind11;

namespace {

// Each argument is the bytes of one parameter.
bool launch(const std::string& kernel, const std::vector<unsigned>& grid,
            const std::vector<unsigned>& block, const std::vector<py::bytes>& arguments,
            std::size_t dynamic_shared) {
    const std::vector<std::size_t> sizes = emulator::ptx::parameter_bytes(kernel);
    if (sizes.size() != arguments.size()) {
        throw py::value_error("the kernel has " + std::to_string(sizes.size()) + " parameters");
    }
    std::vector<std::string> values;
    std::vector<const void*> pointers;
    for (const py::bytes& argument : arguments) values.push_back(argument);
    for (std::size_t i = 0; i < values.size(); ++i) {
        if (values[i].size() != sizes[i]) throw py::value_error("an argument of another size");
        pointers.push_back(values[i].data());
    }
    const auto dim = [](const std::vector<unsigned>& v) {
        return dim3(v.at(0), v.size() > 1 ? v[1] : 1, v.size() > 2 ? v[2] : 1);
    };
    return emulator::ptx::launch(kernel, dim(grid), dim(block), dynamic_shared, pointers.data());
}

// The 128 bytes of a map of float32, without swizzle; strides in bytes, of dimensions 1 and up.
py::bytes tensor_map(std::uint64_t address, const std::vector<cuuint64_t>& sizes,
                     const std::vector<cuuint64_t>& strides, const std::vector<cuuint32_t>& box) {
    if (sizes.empty() || strides.size() + 1 != sizes.size() || box.size() != sizes.size()) {
        throw py::value_error("sizes, strides and box are of different dimensions");
    }
    void* encode = nullptr;
    cudaDriverEntryPointQueryResult found{};
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, CUDART_VERSION,
                                     cudaEnableDefault, &found);
    const std::vector<cuuint32_t> steps(sizes.size(), 1);
    CUtensorMap map{};
    const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
        &map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, static_cast<cuuint32_t>(sizes.size()),
        reinterpret_cast<void*>(address), sizes.data(), strides.data(), box.data(), steps.data(),
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) throw py::value_error("cuTensorMapEncodeTiled refuses the map");
    return py::bytes(reinterpret_cast<const char*>(&map), sizeof map);
}

}  // namespace

void bind_ptx(py::module_& m) {
    py::register_local_exception<emulator::ptx::Unsupported>(m, "Unsupported", PyExc_ValueError);
    m.def("load_ptx", &emulator::ptx::load_module, py::arg("text"));
    m.def("ptx_kernels", &emulator::ptx::kernel_names);
    m.def("ptx_text", [](const std::string& kernel) {
        return std::string(emulator::ptx::module_text(kernel));
    });
    m.def("ptx_reached_lines", &emulator::ptx::reached_lines, py::arg("kernel"));
    m.def("tensor_map", &tensor_map, py::arg("address"), py::arg("sizes"), py::arg("strides"),
          py::arg("box"));
    m.def("launch_ptx", &launch, py::arg("kernel"), py::arg("grid"), py::arg("block"),
          py::arg("arguments"), py::arg("dynamic_shared") = 0);
}
