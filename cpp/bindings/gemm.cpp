#include "fastllm/gemm.hpp"

#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "binding.hpp"
#include "dlpack_tensor.hpp"
#include "fastllm/cuda_device.hpp"

namespace py = pybind11;

namespace fastllm::bindings {
namespace {

// The products' shared arguments: x (m, k) and a weight (n, k), or a list of such.
void require_matrix(const DlpackTensor& t, const DlpackTensor& x, std::int64_t rows,
                    std::int64_t cols) {
    t.beside(x).dense(x.dtype()).shaped({rows, cols});
}

void require_cuda(const DlpackTensor& x) {
    if (x.ndim() != 2) x.fail("has not two dimensions");
    x.dense(x.dtype());
    if (x.device() != Device::kCuda) x.fail("is not on a CUDA device");
}

template <class Args>
void call(void (*op)(const Args&, void*), const Args& args, const DlpackTensor& x,
          std::uintptr_t stream) {
    py::gil_scoped_release unlocked;
    const cuda::DeviceGuard guard(x.device_id());
    op(args, reinterpret_cast<void*>(stream));
}

void linear_bias(py::handle x_, py::handle w_, py::handle bias_, py::handle y_,
                 std::uintptr_t stream) {
    const char* op = "linear_bias";
    const DlpackTensor x(op, "x", x_);
    const DlpackTensor w(op, "w", w_);
    const MaybeTensor bias = optional_tensor(op, "bias", bias_);
    const DlpackTensor y(op, "y", y_);
    require_cuda(x);
    const std::int64_t m = x.size(0), k = x.size(1), n = w.size(0);
    require_matrix(w, x, n, k);
    require_matrix(y.writable(), x, m, n);
    if (bias) bias->beside(x).dense(x.dtype()).shaped({n});
    require_disjoint({&y}, {&x, &w});
    call(&cuda::linear_bias, {x.dtype(), m, n, k, x.data(), w.data(), data_or_null(bias), y.data()},
         x, stream);
}

void linear_bias_gelu(py::handle x_, py::handle w_, py::handle bias_, py::handle y_,
                      py::handle pre_, std::uintptr_t stream) {
    const char* op = "linear_bias_gelu";
    const DlpackTensor x(op, "x", x_);
    const DlpackTensor w(op, "w", w_);
    const DlpackTensor bias(op, "bias", bias_);
    const DlpackTensor y(op, "y", y_);
    const DlpackTensor pre(op, "pre", pre_);
    require_cuda(x);
    const std::int64_t m = x.size(0), k = x.size(1), n = w.size(0);
    require_matrix(w, x, n, k);
    require_matrix(y.writable(), x, m, n);
    require_matrix(pre.writable(), x, m, n);
    bias.beside(x).dense(x.dtype()).shaped({n});
    require_disjoint({&y, &pre}, {&x, &w, &bias});
    call(&cuda::linear_bias_gelu,
         {x.dtype(), m, n, k, x.data(), w.data(), bias.data(), y.data(), pre.data()}, x, stream);
}

void linear_swiglu(py::handle x_, py::handle wg_, py::handle wu_, py::handle gate_, py::handle up_,
                   py::handle y_, std::uintptr_t stream) {
    const char* op = "linear_swiglu";
    const DlpackTensor x(op, "x", x_);
    const DlpackTensor wg(op, "wg", wg_);
    const DlpackTensor wu(op, "wu", wu_);
    const DlpackTensor gate(op, "gate", gate_);
    const DlpackTensor up(op, "up", up_);
    const DlpackTensor y(op, "y", y_);
    require_cuda(x);
    const std::int64_t m = x.size(0), k = x.size(1), n = wg.size(0);
    require_matrix(wg, x, n, k);
    require_matrix(wu, x, n, k);
    for (const DlpackTensor* out : {&gate, &up, &y}) require_matrix(out->writable(), x, m, n);
    require_disjoint({&gate, &up, &y}, {&x, &wg, &wu});
    call(&cuda::linear_swiglu,
         {x.dtype(), m, n, k, x.data(), wg.data(), wu.data(), gate.data(), up.data(), y.data()}, x,
         stream);
}

void linear_weight_grad(py::handle dy_, py::handle x_, py::handle dw_, std::uintptr_t stream) {
    const char* op = "linear_weight_grad";
    const DlpackTensor dy(op, "dy", dy_);
    const DlpackTensor x(op, "x", x_);
    const DlpackTensor dw(op, "dw", dw_);
    require_cuda(x);
    const std::int64_t m = x.size(0), k = x.size(1), n = dy.size(-1);
    require_matrix(dy, x, m, n);
    dw.beside(x).dense(DType::kFloat32).shaped({n, k}).writable();
    require_disjoint({&dw}, {&dy, &x});
    call(&cuda::linear_weight_grad, {x.dtype(), m, n, k, dy.data(), x.data(), dw.data_as<float>()},
         x, stream);
}

void grouped_linear(py::handle x_, py::handle w_, py::handle offsets_, py::handle y_,
                    py::handle workspace_, std::uintptr_t stream) {
    const char* op = "grouped_linear";
    const DlpackTensor x(op, "x", x_);
    const DlpackTensor w(op, "w", w_);
    const DlpackTensor offsets(op, "offsets", offsets_);
    const DlpackTensor y(op, "y", y_);
    const DlpackTensor workspace(op, "workspace", workspace_);
    require_cuda(x);
    if (w.ndim() != 3) w.fail("has not three dimensions");
    const std::int64_t m = x.size(0), k = x.size(1), groups = w.size(0), n = w.size(1);
    w.beside(x).dense(x.dtype()).shaped({groups, n, k});
    require_matrix(y.writable(), x, m, n);
    offsets.beside(x).dense_int64().shaped({groups + 1});
    workspace.beside(x).dense_int64().writable();
    const auto bytes = static_cast<std::size_t>(workspace.count()) * sizeof(std::int64_t);
    if (bytes < cuda::grouped_workspace_bytes(groups)) workspace.fail("is too small");
    require_disjoint({&y, &workspace}, {&x, &w, &offsets});
    call(&cuda::grouped_linear,
         {x.dtype(), m, n, k, groups, x.data(), w.data(), offsets.data_as<std::int64_t>(), y.data(),
          workspace.data()},
         x, stream);
}

}  // namespace
}  // namespace fastllm::bindings

FASTLLM_BINDING(gemm) {
    using namespace fastllm::bindings;
    const auto stream = py::arg("stream") = 0;
    m.def("linear_bias", &linear_bias, py::arg("x"), py::arg("w"), py::arg("bias"), py::arg("y"),
          stream);
    m.def("linear_bias_gelu", &linear_bias_gelu, py::arg("x"), py::arg("w"), py::arg("bias"),
          py::arg("y"), py::arg("pre"), stream);
    m.def("linear_swiglu", &linear_swiglu, py::arg("x"), py::arg("wg"), py::arg("wu"),
          py::arg("gate"), py::arg("up"), py::arg("y"), stream);
    m.def("linear_weight_grad", &linear_weight_grad, py::arg("dy"), py::arg("x"), py::arg("dw"),
          stream);
    m.def("grouped_linear", &grouped_linear, py::arg("x"), py::arg("w"), py::arg("offsets"),
          py::arg("y"), py::arg("workspace"), stream);
    m.def("gemm_dtypes", [] {
        std::vector<std::string> names = {"bfloat16"};
        if (FASTLLM_GEMM_FP16) names.emplace_back("float16");
        return names;
    });
    m.def("grouped_workspace_bytes", &fastllm::cuda::grouped_workspace_bytes, py::arg("groups"));
}
