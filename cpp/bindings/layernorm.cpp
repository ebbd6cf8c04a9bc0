#include "fastllm/layernorm.hpp"

#include "binding.hpp"
#include "dlpack_tensor.hpp"
#include "fastllm/cuda_device.hpp"

namespace py = pybind11;

namespace fastllm::bindings {
namespace {

void layernorm_fwd(py::handle x_, py::handle residual_, py::handle weight_, py::handle bias_,
                   py::handle y_, py::handle residual_out_, py::handle mean_, py::handle rstd_,
                   float eps, std::uintptr_t stream) {
    const char* op = "layernorm_fwd";
    const DlpackTensor x(op, "x", x_);
    const DlpackTensor weight(op, "weight", weight_);
    const DlpackTensor y(op, "y", y_);
    const DlpackTensor mean(op, "mean", mean_);
    const DlpackTensor rstd(op, "rstd", rstd_);
    const MaybeTensor bias = optional_tensor(op, "bias", bias_);
    const MaybeTensor residual = optional_tensor(op, "residual", residual_);
    const MaybeTensor residual_out = optional_tensor(op, "residual_out", residual_out_);

    const DType dtype = x.dtype();
    const auto [rows, cols] = x.rows_and_cols();
    x.dense(dtype);
    weight.beside(x).dense(dtype).shaped({cols});
    if (bias) bias->beside(x).dense(dtype).shaped({cols});
    y.beside(x).dense(dtype).like(x).writable();
    for (const DlpackTensor* output : {&mean, &rstd}) {
        output->beside(x).dense(DType::kFloat32).holding(rows).writable();
    }
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
    const DlpackTensor* shift = pointer_or_null(bias);
    require_disjoint({&y, &mean, &rstd}, {&x, &weight, shift, added, h});
    require_disjoint({h}, {&weight, shift, h != nullptr && h->data() == x.data() ? nullptr : &x,
                           h != nullptr && h->data() == added->data() ? nullptr : added});
    require_backend(x);
    const LayerNormFwd args{dtype,
                            rows,
                            cols,
                            eps,
                            x.data(),
                            data_or_null(residual),
                            weight.data(),
                            data_or_null(bias),
                            y.data(),
                            data_or_null(residual_out),
                            mean.data_as<float>(),
                            rstd.data_as<float>()};
    FASTLLM_RUN(x, layernorm_fwd, args, stream);
}

std::int64_t layernorm_bwd_parts(std::int64_t rows, std::int64_t cols, bool cuda,
                                 std::int32_t device_id) {
    return FASTLLM_PARTS(layernorm_bwd_parts, rows, cols, cuda, device_id);
}

void layernorm_bwd(py::handle dy_, py::handle h_, py::handle weight_, py::handle mean_,
                   py::handle rstd_, py::handle dh_, py::handle dx_, py::handle dweight_,
                   py::handle dbias_, py::handle partial_, std::uintptr_t stream) {
    const char* op = "layernorm_bwd";
    const DlpackTensor dy(op, "dy", dy_);
    const DlpackTensor h(op, "h", h_);
    const DlpackTensor weight(op, "weight", weight_);
    const DlpackTensor mean(op, "mean", mean_);
    const DlpackTensor rstd(op, "rstd", rstd_);
    const DlpackTensor dx(op, "dx", dx_);
    const DlpackTensor dweight(op, "dweight", dweight_);
    const DlpackTensor partial(op, "partial", partial_);
    const MaybeTensor dh = optional_tensor(op, "dh", dh_);
    const MaybeTensor dbias = optional_tensor(op, "dbias", dbias_);

    const DType dtype = dy.dtype();
    const auto [rows, cols] = dy.rows_and_cols();
    dy.dense(dtype);
    require_backend(dy);
    h.beside(dy).dense(dtype).like(dy);
    weight.beside(dy).dense(dtype).shaped({cols});
    mean.beside(dy).dense(DType::kFloat32).holding(rows);
    rstd.beside(dy).dense(DType::kFloat32).holding(rows);
    dx.beside(dy).dense(dtype).like(dy).writable();
    dweight.beside(dy).dense(dtype).shaped({cols}).writable();
    if (dbias) dbias->beside(dy).dense(dtype).shaped({cols}).writable();
    if (dh) dh->beside(dy).dense(dtype).like(dy);
    const std::int64_t parts =
        layernorm_bwd_parts(rows, cols, dy.device() == Device::kCuda, dy.device_id());
    partial.beside(dy).dense(DType::kFloat32).shaped({2, parts, cols}).writable();
    require_disjoint({&dx, &dweight, pointer_or_null(dbias), &partial},
                     {&dy, &h, &weight, &mean, &rstd, pointer_or_null(dh)});
    const LayerNormBwd args{dtype,
                            rows,
                            cols,
                            dy.data(),
                            h.data(),
                            weight.data(),
                            mean.data_as<float>(),
                            rstd.data_as<float>(),
                            data_or_null(dh),
                            dx.data(),
                            dweight.data(),
                            data_or_null(dbias),
                            partial.data_as<float>(),
                            parts};
    FASTLLM_RUN(dy, layernorm_bwd, args, stream);
}

}  // namespace
}  // namespace fastllm::bindings

FASTLLM_BINDING(layernorm) {
    using namespace fastllm::bindings;
    m.def("layernorm_fwd", &layernorm_fwd, py::arg("x"), py::arg("residual"), py::arg("weight"),
          py::arg("bias"), py::arg("y"), py::arg("residual_out"), py::arg("mean"), py::arg("rstd"),
          py::arg("eps"), py::arg("stream") = 0);
    m.def("layernorm_bwd_parts", &layernorm_bwd_parts, py::arg("rows"), py::arg("cols"),
          py::arg("cuda") = false, py::arg("device_id") = 0);
    m.def("layernorm_bwd", &layernorm_bwd, py::arg("dy"), py::arg("h"), py::arg("weight"),
          py::arg("mean"), py::arg("rstd"), py::arg("dh"), py::arg("dx"), py::arg("dweight"),
          py::arg("dbias"), py::arg("partial"), py::arg("stream") = 0);
}
