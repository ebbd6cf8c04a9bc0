#include "fastllm/rmsnorm.hpp"

#include "binding.hpp"
#include "dlpack_tensor.hpp"
#include "fastllm/cuda_device.hpp"

namespace py = pybind11;

namespace fastllm::bindings {
namespace {

std::int64_t rows_of(const DlpackTensor& x) {
    if (x.ndim() < 1 || x.size(-1) < 1) x.fail("has no columns, expected shape (..., cols)");
    return x.count() / x.size(-1);
}

void rmsnorm_fwd(py::handle x_, py::handle residual_, py::handle weight_, py::handle y_,
                 py::handle residual_out_, py::handle rstd_, float eps, std::uintptr_t stream) {
    const char* op = "rmsnorm_fwd";
    const DlpackTensor x(op, "x", x_);
    const DlpackTensor weight(op, "weight", weight_);
    const DlpackTensor y(op, "y", y_);
    const DlpackTensor rstd(op, "rstd", rstd_);
    const MaybeTensor residual = optional_tensor(op, "residual", residual_);
    const MaybeTensor residual_out = optional_tensor(op, "residual_out", residual_out_);

    const DType dtype = x.dtype();
    const std::int64_t rows = rows_of(x);
    const std::int64_t cols = x.size(-1);
    x.dense(dtype);
    weight.beside(x).dense(dtype).shaped({cols});
    y.beside(x).dense(dtype).like(x).writable();
    rstd.beside(x).dense(DType::kFloat32).shaped({rows}).writable();
    if (residual.has_value() != residual_out.has_value()) {
        x.fail("needs both residual and residual_out, or neither");
    }
    if (residual) {
        residual->beside(x).dense(dtype).like(x);
        residual_out->beside(x).dense(dtype).like(x).writable();
    }
    // residual_out may be x or residual, but not another part of their memory.
    const DlpackTensor* h = pointer_or_null(residual_out);
    const DlpackTensor* added = pointer_or_null(residual);
    require_disjoint({&y, &rstd}, {&x, &weight, added, h});
    require_disjoint({h}, {&weight, h != nullptr && h->data() == x.data() ? nullptr : &x,
                           h != nullptr && h->data() == added->data() ? nullptr : added});
    require_backend(x);
    const RmsNormFwd args{dtype,
                          rows,
                          cols,
                          eps,
                          x.data(),
                          data_or_null(residual),
                          weight.data(),
                          y.data(),
                          data_or_null(residual_out),
                          rstd.data_as<float>()};
    py::gil_scoped_release unlocked;
    if (x.device() == Device::kCpu) return cpu::rmsnorm_fwd(args);
#if FASTLLM_WITH_CUDA
    const cuda::DeviceGuard guard(x.device_id());
    cuda::rmsnorm_fwd(args, reinterpret_cast<void*>(stream));
#else
    (void)stream;
#endif
}

std::int64_t parts_on(Device device, std::int32_t device_id, std::int64_t rows, std::int64_t cols) {
    if (device == Device::kCpu) return cpu::rmsnorm_bwd_parts(rows, cols);
#if FASTLLM_WITH_CUDA
    const cuda::DeviceGuard guard(device_id);
    return cuda::rmsnorm_bwd_parts(rows, cols);
#else
    (void)device_id;
    (void)device;
    throw py::value_error("rmsnorm_bwd_parts: fastllm_core was built without CUDA kernels");
#endif
}

std::int64_t rmsnorm_bwd_parts(std::int64_t rows, std::int64_t cols, bool cuda,
                               std::int32_t device_id) {
    if (rows < 0 || cols < 1) {
        throw py::value_error("rmsnorm_bwd_parts: expected rows >= 0 and cols >= 1");
    }
    return parts_on(cuda ? Device::kCuda : Device::kCpu, device_id, rows, cols);
}

void rmsnorm_bwd(py::handle dy_, py::handle h_, py::handle weight_, py::handle rstd_,
                 py::handle dh_, py::handle dx_, py::handle dweight_, py::handle partial_,
                 std::uintptr_t stream) {
    const char* op = "rmsnorm_bwd";
    const DlpackTensor dy(op, "dy", dy_);
    const DlpackTensor h(op, "h", h_);
    const DlpackTensor weight(op, "weight", weight_);
    const DlpackTensor rstd(op, "rstd", rstd_);
    const DlpackTensor dx(op, "dx", dx_);
    const DlpackTensor dweight(op, "dweight", dweight_);
    const DlpackTensor partial(op, "partial", partial_);
    const MaybeTensor dh = optional_tensor(op, "dh", dh_);

    const DType dtype = dy.dtype();
    const std::int64_t rows = rows_of(dy);
    const std::int64_t cols = dy.size(-1);
    dy.dense(dtype);
    require_backend(dy);
    h.beside(dy).dense(dtype).like(dy);
    weight.beside(dy).dense(dtype).shaped({cols});
    rstd.beside(dy).dense(DType::kFloat32).shaped({rows});
    dx.beside(dy).dense(dtype).like(dy).writable();
    dweight.beside(dy).dense(dtype).shaped({cols}).writable();
    const std::int64_t parts = parts_on(dy.device(), dy.device_id(), rows, cols);
    partial.beside(dy).dense(DType::kFloat32).shaped({parts, cols}).writable();
    if (dh) dh->beside(dy).dense(dtype).like(dy);
    require_disjoint({&dx, &dweight, &partial}, {&dy, &h, &weight, &rstd, pointer_or_null(dh)});
    const RmsNormBwd args{dtype,
                          rows,
                          cols,
                          dy.data(),
                          h.data(),
                          weight.data(),
                          rstd.data_as<float>(),
                          data_or_null(dh),
                          dx.data(),
                          dweight.data(),
                          partial.data_as<float>(),
                          parts};
    py::gil_scoped_release unlocked;
    if (dy.device() == Device::kCpu) return cpu::rmsnorm_bwd(args);
#if FASTLLM_WITH_CUDA
    const cuda::DeviceGuard guard(dy.device_id());
    cuda::rmsnorm_bwd(args, reinterpret_cast<void*>(stream));
#else
    (void)stream;
#endif
}

}  // namespace
}  // namespace fastllm::bindings

FASTLLM_BINDING(rmsnorm) {
    using namespace fastllm::bindings;
    m.def("rmsnorm_fwd", &rmsnorm_fwd, py::arg("x"), py::arg("residual"), py::arg("weight"),
          py::arg("y"), py::arg("residual_out"), py::arg("rstd"), py::arg("eps"),
          py::arg("stream") = 0);
    m.def("rmsnorm_bwd_parts", &rmsnorm_bwd_parts, py::arg("rows"), py::arg("cols"),
          py::arg("cuda") = false, py::arg("device_id") = 0);
    m.def("rmsnorm_bwd", &rmsnorm_bwd, py::arg("dy"), py::arg("h"), py::arg("weight"),
          py::arg("rstd"), py::arg("dh"), py::arg("dx"), py::arg("dweight"), py::arg("partial"),
          py::arg("stream") = 0);
}
