#include "fastllm/softmax.hpp"

#include "binding.hpp"
#include "dlpack_tensor.hpp"
#include "fastllm/cuda_device.hpp"

namespace py = pybind11;

namespace fastllm::bindings {
namespace {

void require_scores(const DlpackTensor& t) {
    if (t.ndim() != 4 || t.size(3) < 1) {
        t.fail("has not the shape (batch, heads, queries, cols) with one column or more");
    }
}

// Stride of a dimension that may be 1 where x's is `size`.
std::int64_t broadcast_stride(const DlpackTensor& mask, int dimension, std::int64_t size) {
    if (mask.size(dimension) == size) return mask.stride(dimension);
    if (mask.size(dimension) != 1) mask.fail("does not broadcast to the shape of x");
    return 0;
}

void softmax_fwd(py::handle x_, py::handle mask_, py::handle slopes_, py::handle y_, float scale,
                 bool causal, std::uintptr_t stream) {
    const char* op = "softmax_fwd";
    const DlpackTensor x(op, "x", x_);
    const DlpackTensor y(op, "y", y_);
    const MaybeTensor mask = optional_tensor(op, "mask", mask_);
    const MaybeTensor slopes = optional_tensor(op, "slopes", slopes_);
    const DType dtype = x.dtype();
    require_scores(x);
    x.dense(dtype);
    y.beside(x).dense(dtype).like(x).writable();
    require_same_or_disjoint(y, x);
    require_disjoint({&y}, {pointer_or_null(mask), pointer_or_null(slopes)});
    require_backend(x);
    SoftmaxFwd args{dtype,    x.size(0), x.size(1), x.size(2), x.size(3), scale,   causal,
                    x.data(), nullptr,   0,         0,         0,         nullptr, y.data()};
    if (mask) {
        mask->beside(x).bytes();
        if (mask->ndim() != 4 || mask->size(3) != x.size(3) ||
            (mask->size(3) > 1 && mask->stride(3) != 1)) {
            mask->fail("has not 4 dimensions with the adjacent columns of x");
        }
        args.mask = mask->data_as<std::uint8_t>();
        args.mask_batch_stride = broadcast_stride(*mask, 0, x.size(0));
        args.mask_head_stride = broadcast_stride(*mask, 1, x.size(1));
        args.mask_query_stride = broadcast_stride(*mask, 2, x.size(2));
    }
    if (slopes) {
        slopes->beside(x).dense(DType::kFloat32).shaped({x.size(1)});
        args.slopes = slopes->data_as<float>();
    }
    FASTLLM_RUN(x, softmax_fwd, args, stream);
}

void softmax_bwd(py::handle dy_, py::handle y_, py::handle dx_, float scale, bool causal,
                 std::uintptr_t stream) {
    const char* op = "softmax_bwd";
    const DlpackTensor dy(op, "dy", dy_);
    const DlpackTensor y(op, "y", y_);
    const DlpackTensor dx(op, "dx", dx_);
    const DType dtype = dy.dtype();
    require_scores(dy);
    dy.dense(dtype);
    y.beside(dy).dense(dtype).like(dy);
    dx.beside(dy).dense(dtype).like(dy).writable();
    require_same_or_disjoint(dx, dy);
    require_disjoint({&dx}, {&y});
    require_backend(dy);
    const SoftmaxBwd args{dtype,      dy.count() / dy.size(3),
                          dy.size(2), dy.size(3),
                          scale,      causal,
                          dy.data(),  y.data(),
                          dx.data()};
    FASTLLM_RUN(dy, softmax_bwd, args, stream);
}

}  // namespace
}  // namespace fastllm::bindings

FASTLLM_BINDING(softmax) {
    using namespace fastllm::bindings;
    m.def("softmax_fwd", &softmax_fwd, py::arg("x"), py::arg("mask"), py::arg("slopes"),
          py::arg("y"), py::arg("scale"), py::arg("causal"), py::arg("stream") = 0);
    m.def("softmax_bwd", &softmax_bwd, py::arg("dy"), py::arg("y"), py::arg("dx"), py::arg("scale"),
          py::arg("causal"), py::arg("stream") = 0);
}
