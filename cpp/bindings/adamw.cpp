#include "fastllm/adamw.hpp"

#include <cmath>

#include "binding.hpp"
#include "dlpack_tensor.hpp"
#include "fastllm/cuda_device.hpp"

namespace py = pybind11;

namespace fastllm::bindings {
namespace {

void adamw(py::handle master_, py::handle grad_, py::handle exp_avg_, py::handle exp_avg_sq_,
           py::handle model_, py::handle grad_scale_, double lr, double beta1, double beta2,
           double eps, double weight_decay, std::int64_t step, std::uintptr_t stream) {
    const char* op = "adamw";
    const DlpackTensor master(op, "master", master_);
    const DlpackTensor grad(op, "grad", grad_);
    const DlpackTensor exp_avg(op, "exp_avg", exp_avg_);
    const DlpackTensor exp_avg_sq(op, "exp_avg_sq", exp_avg_sq_);
    const MaybeTensor model = optional_tensor(op, "model", model_);
    const MaybeTensor grad_scale = optional_tensor(op, "grad_scale", grad_scale_);
    if (step < 1) throw py::value_error("adamw: step counts from 1");

    const bool in_halves = master.is_int16();
    if (in_halves) {
        if (!model) master.fail("is int16, the lower halves of masters: model must be given");
        master.dense_int16().writable();
        model->typed(DType::kBFloat16);
    } else {
        master.dense(DType::kFloat32).writable();
    }
    grad.beside(master).dense(grad.dtype()).like(master);
    for (const DlpackTensor* state : {&exp_avg, &exp_avg_sq}) {
        state->beside(master).dense(DType::kFloat32).like(master).writable();
    }
    if (model) model->beside(master).dense(model->dtype()).like(master).writable();
    if (grad_scale) {
        grad_scale->beside(master).dense(DType::kFloat32);
        if (grad_scale->count() != 1) grad_scale->fail("has not one element");
    }
    require_disjoint({&master, &exp_avg, &exp_avg_sq, pointer_or_null(model)},
                     {&grad, pointer_or_null(grad_scale)});
    require_backend(master);
    const AdamW args{
        master.count(),
        static_cast<float>(lr),
        static_cast<float>(beta1),
        static_cast<float>(beta2),
        static_cast<float>(eps),
        static_cast<float>(weight_decay),
        static_cast<float>(1.0 - std::pow(beta1, static_cast<double>(step))),
        static_cast<float>(std::sqrt(1.0 - std::pow(beta2, static_cast<double>(step)))),
        in_halves ? nullptr : master.data_as<float>(),
        in_halves ? master.data_as<std::int16_t>() : nullptr,
        exp_avg.data_as<float>(),
        exp_avg_sq.data_as<float>(),
        grad.dtype(),
        grad.data(),
        static_cast<const float*>(data_or_null(grad_scale)),
        model ? model->dtype() : DType::kFloat32,
        data_or_null(model)};
    FASTLLM_RUN(master, adamw, args, stream);
}

}  // namespace
}  // namespace fastllm::bindings

FASTLLM_BINDING(adamw) {
    m.def("adamw", &fastllm::bindings::adamw, py::arg("master"), py::arg("grad"),
          py::arg("exp_avg"), py::arg("exp_avg_sq"), py::arg("model"), py::arg("grad_scale"),
          py::arg("lr"), py::arg("beta1"), py::arg("beta2"), py::arg("eps"),
          py::arg("weight_decay"), py::arg("step"), py::arg("stream") = 0);
}
