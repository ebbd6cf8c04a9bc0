#include "fastllm/bias_gelu.hpp"

#include "binding.hpp"
#include "dlpack_tensor.hpp"
#include "fastllm/cuda_device.hpp"

namespace py = pybind11;

namespace fastllm::bindings {
namespace {

void bias_gelu_fwd(py::handle x_, py::handle bias_, py::handle y_, std::uintptr_t stream) {
    const char* op = "bias_gelu_fwd";
    const DlpackTensor x(op, "x", x_);
    const DlpackTensor bias(op, "bias", bias_);
    const DlpackTensor y(op, "y", y_);
    const DType dtype = x.dtype();
    const auto [rows, cols] = x.rows_and_cols();
    x.dense(dtype);
    bias.beside(x).dense(dtype).shaped({cols});
    y.beside(x).dense(dtype).like(x).writable();
    require_same_or_disjoint(y, x);
    require_disjoint({&y}, {&bias});
    require_backend(x);
    const BiasGeluFwd args{dtype, rows, cols, x.data(), bias.data(), y.data()};
    FASTLLM_RUN(x, bias_gelu_fwd, args, stream);
}

std::int64_t bias_gelu_bwd_parts(std::int64_t rows, std::int64_t cols, bool cuda,
                                 std::int32_t device_id) {
    return FASTLLM_PARTS(bias_gelu_bwd_parts, rows, cols, cuda, device_id);
}

void bias_gelu_bwd(py::handle dy_, py::handle x_, py::handle bias_, py::handle dx_,
                   py::handle dbias_, py::handle partial_, std::uintptr_t stream) {
    const char* op = "bias_gelu_bwd";
    const DlpackTensor dy(op, "dy", dy_);
    const DlpackTensor x(op, "x", x_);
    const DlpackTensor bias(op, "bias", bias_);
    const DlpackTensor dx(op, "dx", dx_);
    const DlpackTensor dbias(op, "dbias", dbias_);
    const DlpackTensor partial(op, "partial", partial_);
    const DType dtype = dy.dtype();
    const auto [rows, cols] = dy.rows_and_cols();
    dy.dense(dtype);
    require_backend(dy);
    x.beside(dy).dense(dtype).like(dy);
    bias.beside(dy).dense(dtype).shaped({cols});
    dx.beside(dy).dense(dtype).like(dy).writable();
    dbias.beside(dy).dense(dtype).shaped({cols}).writable();
    const std::int64_t parts =
        bias_gelu_bwd_parts(rows, cols, dy.device() == Device::kCuda, dy.device_id());
    partial.beside(dy).dense(DType::kFloat32).shaped({parts, cols}).writable();
    for (const DlpackTensor* input : {&dy, &x}) require_same_or_disjoint(dx, *input);
    require_disjoint({&dbias, &partial, &dx}, {&bias});
    require_disjoint({&dbias, &partial}, {&dy, &x});
    const BiasGeluBwd args{dtype,     rows,         cols,
                           dy.data(), x.data(),     bias.data(),
                           dx.data(), dbias.data(), partial.data_as<float>(),
                           parts};
    FASTLLM_RUN(dy, bias_gelu_bwd, args, stream);
}

}  // namespace
}  // namespace fastllm::bindings

FASTLLM_BINDING(bias_gelu) {
    using namespace fastllm::bindings;
    m.def("bias_gelu_fwd", &bias_gelu_fwd, py::arg("x"), py::arg("bias"), py::arg("y"),
          py::arg("stream") = 0);
    m.def("bias_gelu_bwd_parts", &bias_gelu_bwd_parts, py::arg("rows"), py::arg("cols"),
          py::arg("cuda") = false, py::arg("device_id") = 0);
    m.def("bias_gelu_bwd", &bias_gelu_bwd, py::arg("dy"), py::arg("x"), py::arg("bias"),
          py::arg("dx"), py::arg("dbias"), py::arg("partial"), py::arg("stream") = 0);
}
