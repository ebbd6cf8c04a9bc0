#include "fastllm/cross_entropy.hpp"

#include "binding.hpp"
#include "dlpack_tensor.hpp"
#include "fastllm/cuda_device.hpp"

namespace py = pybind11;

namespace fastllm::bindings {
namespace {

std::int64_t rows_of(const DlpackTensor& logits) {
    if (logits.ndim() != 2 || logits.size(1) < 1) {
        logits.fail("has not the shape (rows, cols) with one column or more");
    }
    return logits.size(0);
}

void cross_entropy_fwd(py::handle logits_, py::handle labels_, py::handle max_, py::handle sum_,
                       py::handle target_, std::int64_t first, std::int64_t ignore, bool merge,
                       std::uintptr_t stream) {
    const char* op = "cross_entropy_fwd";
    const DlpackTensor logits(op, "logits", logits_);
    const DlpackTensor labels(op, "labels", labels_);
    const DlpackTensor max(op, "max", max_);
    const DlpackTensor sum(op, "sum", sum_);
    const DlpackTensor target(op, "target", target_);
    const DType dtype = logits.dtype();
    const std::int64_t rows = rows_of(logits);
    logits.dense(dtype);
    labels.beside(logits).dense_int64().shaped({rows});
    for (const DlpackTensor* output : {&max, &sum, &target}) {
        output->beside(logits).dense(DType::kFloat32).shaped({rows}).writable();
    }
    require_disjoint({&max, &sum, &target}, {&logits, &labels});
    require_backend(logits);
    const CrossEntropyFwd args{dtype,
                               rows,
                               logits.size(1),
                               first,
                               ignore,
                               logits.data(),
                               labels.data_as<std::int64_t>(),
                               max.data_as<float>(),
                               sum.data_as<float>(),
                               target.data_as<float>(),
                               merge};
    FASTLLM_RUN(logits, cross_entropy_fwd, args, stream);
}

void cross_entropy_loss(py::handle logits_, py::handle labels_, py::handle lse_, py::handle loss_,
                        std::int64_t ignore, std::uintptr_t stream) {
    const char* op = "cross_entropy_loss";
    const DlpackTensor logits(op, "logits", logits_);
    const DlpackTensor labels(op, "labels", labels_);
    const DlpackTensor lse(op, "lse", lse_);
    const DlpackTensor loss(op, "loss", loss_);
    const DType dtype = logits.dtype();
    const std::int64_t rows = rows_of(logits);
    logits.dense(dtype);
    labels.beside(logits).dense_int64().shaped({rows});
    for (const DlpackTensor* output : {&lse, &loss}) {
        output->beside(logits).dense(DType::kFloat32).shaped({rows}).writable();
    }
    require_disjoint({&lse, &loss}, {&logits, &labels});
    require_backend(logits);
    const CrossEntropyLoss args{dtype,
                                rows,
                                logits.size(1),
                                ignore,
                                logits.data(),
                                labels.data_as<std::int64_t>(),
                                lse.data_as<float>(),
                                loss.data_as<float>()};
    FASTLLM_RUN(logits, cross_entropy_loss, args, stream);
}

void cross_entropy_bwd(py::handle logits_, py::handle labels_, py::handle lse_, py::handle dloss_,
                       py::handle dlogits_, std::int64_t first, std::int64_t ignore,
                       std::uintptr_t stream) {
    const char* op = "cross_entropy_bwd";
    const DlpackTensor logits(op, "logits", logits_);
    const DlpackTensor labels(op, "labels", labels_);
    const DlpackTensor lse(op, "lse", lse_);
    const DlpackTensor dloss(op, "dloss", dloss_);
    const DlpackTensor dlogits(op, "dlogits", dlogits_);
    const DType dtype = logits.dtype();
    const std::int64_t rows = rows_of(logits);
    logits.dense(dtype);
    labels.beside(logits).dense_int64().shaped({rows});
    lse.beside(logits).dense(DType::kFloat32).shaped({rows});
    dloss.beside(logits).dense(DType::kFloat32).shaped({rows});
    dlogits.beside(logits).dense(dtype).like(logits).writable();
    require_same_or_disjoint(dlogits, logits);
    require_disjoint({&dlogits}, {&labels, &lse, &dloss});
    require_backend(logits);
    const CrossEntropyBwd args{dtype,
                               rows,
                               logits.size(1),
                               first,
                               ignore,
                               logits.data(),
                               labels.data_as<std::int64_t>(),
                               lse.data_as<float>(),
                               dloss.data_as<float>(),
                               dlogits.data()};
    FASTLLM_RUN(logits, cross_entropy_bwd, args, stream);
}

}  // namespace
}  // namespace fastllm::bindings

FASTLLM_BINDING(cross_entropy) {
    using namespace fastllm::bindings;
    m.def("cross_entropy_fwd", &cross_entropy_fwd, py::arg("logits"), py::arg("labels"),
          py::arg("max"), py::arg("sum"), py::arg("target"), py::arg("first") = 0,
          py::arg("ignore") = -100, py::arg("merge") = false, py::arg("stream") = 0);
    m.def("cross_entropy_loss", &cross_entropy_loss, py::arg("logits"), py::arg("labels"),
          py::arg("lse"), py::arg("loss"), py::arg("ignore") = -100, py::arg("stream") = 0);
    m.def("cross_entropy_bwd", &cross_entropy_bwd, py::arg("logits"), py::arg("labels"),
          py::arg("lse"), py::arg("dloss"), py::arg("dlogits"), py::arg("first") = 0,
          py::arg("ignore") = -100, py::arg("stream") = 0);
}
