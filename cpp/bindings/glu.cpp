#include "fastllm/glu.hpp"

#include <string>

#include "binding.hpp"
#include "dlpack_tensor.hpp"
#include "fastllm/cuda_device.hpp"

namespace py = pybind11;

namespace fastllm::bindings {
namespace {

GluActivation activation_named(const char* op, const std::string& name) {
    if (name == "silu") return GluActivation::kSilu;
    if (name == "gelu") return GluActivation::kGelu;
    throw py::value_error(std::string(op) + ": activation is \"" + name +
                          "\", expected silu or gelu");
}

void glu_fwd(py::handle gate_, py::handle up_, py::handle y_, const std::string& activation,
             std::uintptr_t stream) {
    const char* op = "glu_fwd";
    const DlpackTensor gate(op, "gate", gate_);
    const DlpackTensor up(op, "up", up_);
    const DlpackTensor y(op, "y", y_);
    const DType dtype = gate.dtype();
    gate.dense(dtype);
    up.beside(gate).dense(dtype).like(gate);
    y.beside(gate).dense(dtype).like(gate).writable();
    for (const DlpackTensor* input : {&gate, &up}) require_same_or_disjoint(y, *input);
    require_backend(gate);
    const GluFwd args{
        dtype, activation_named(op, activation), gate.count(), gate.data(), up.data(), y.data()};
    FASTLLM_RUN(gate, glu_fwd, args, stream);
}

void glu_bwd(py::handle dy_, py::handle gate_, py::handle up_, py::handle dgate_, py::handle dup_,
             const std::string& activation, std::uintptr_t stream) {
    const char* op = "glu_bwd";
    const DlpackTensor dy(op, "dy", dy_);
    const DlpackTensor gate(op, "gate", gate_);
    const DlpackTensor up(op, "up", up_);
    const DlpackTensor dgate(op, "dgate", dgate_);
    const DlpackTensor dup(op, "dup", dup_);
    const DType dtype = dy.dtype();
    dy.dense(dtype);
    for (const DlpackTensor* other : {&gate, &up, &dgate, &dup}) {
        other->beside(dy).dense(dtype).like(dy);
    }
    require_disjoint({&dgate, &dup}, {});
    for (const DlpackTensor* output : {&dgate, &dup}) {
        output->writable();
        for (const DlpackTensor* input : {&dy, &gate, &up}) {
            require_same_or_disjoint(*output, *input);
        }
    }
    require_backend(dy);
    const GluBwd args{dtype,        activation_named(op, activation),
                      dy.count(),   dy.data(),
                      gate.data(),  up.data(),
                      dgate.data(), dup.data()};
    FASTLLM_RUN(dy, glu_bwd, args, stream);
}

}  // namespace
}  // namespace fastllm::bindings

FASTLLM_BINDING(glu) {
    using namespace fastllm::bindings;
    m.def("glu_fwd", &glu_fwd, py::arg("gate"), py::arg("up"), py::arg("y"), py::arg("activation"),
          py::arg("stream") = 0);
    m.def("glu_bwd", &glu_bwd, py::arg("dy"), py::arg("gate"), py::arg("up"), py::arg("dgate"),
          py::arg("dup"), py::arg("activation"), py::arg("stream") = 0);
}
