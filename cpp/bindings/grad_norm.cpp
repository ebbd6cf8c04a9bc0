#include "fastllm/grad_norm.hpp"

#include "binding.hpp"
#include "dlpack_tensor.hpp"
#include "fastllm/cuda_device.hpp"

namespace py = pybind11;

namespace fastllm::bindings {
namespace {

std::int64_t squared_sum_parts(std::int64_t count, bool cuda) {
    if (count < 0) throw py::value_error("squared_sum_parts: expected count >= 0");
#if FASTLLM_WITH_CUDA
    if (cuda) return cuda::squared_sum_parts(count);
#else
    if (cuda) refuse_cuda("squared_sum_parts");
#endif
    return cpu::squared_sum_parts(count);
}

void squared_sum(py::handle x_, py::handle partial_, std::uintptr_t stream) {
    const char* op = "squared_sum";
    const DlpackTensor x(op, "x", x_);
    const DlpackTensor partial(op, "partial", partial_);
    const DType dtype = x.dtype();
    x.dense(dtype);
    require_backend(x);
    const std::int64_t parts = squared_sum_parts(x.count(), x.device() == Device::kCuda);
    partial.beside(x).dense(DType::kFloat32).shaped({parts}).writable();
    require_disjoint({&partial}, {&x});
    const SquaredSum args{dtype, x.count(), x.data(), partial.data_as<float>(), parts};
    FASTLLM_RUN(x, squared_sum, args, stream);
}

}  // namespace
}  // namespace fastllm::bindings

FASTLLM_BINDING(grad_norm) {
    using namespace fastllm::bindings;
    m.def("squared_sum_parts", &squared_sum_parts, py::arg("count"), py::arg("cuda") = false);
    m.def("squared_sum", &squared_sum, py::arg("x"), py::arg("partial"), py::arg("stream") = 0);
}
