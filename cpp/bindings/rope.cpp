#include "fastllm/rope.hpp"

#include "binding.hpp"
#include "dlpack_tensor.hpp"
#include "fastllm/cuda_device.hpp"

namespace py = pybind11;

namespace fastllm::bindings {
namespace {

RopeStrides strides_of(const DlpackTensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

void rope(py::handle x_, py::handle cos_, py::handle sin_, py::handle positions_, py::handle y_,
          bool interleaved, bool inverse, std::uintptr_t stream) {
    const char* op = "rope";
    const DlpackTensor x(op, "x", x_);
    const DlpackTensor cos(op, "cos", cos_);
    const DlpackTensor sin(op, "sin", sin_);
    const DlpackTensor y(op, "y", y_);
    const MaybeTensor positions = optional_tensor(op, "positions", positions_);

    const DType dtype = x.dtype();
    if (x.ndim() != 4) x.fail("has not 4 dimensions (batch, tokens, heads, head_dim)");
    y.beside(x).typed(dtype).like(x).writable();
    for (const DlpackTensor* t : {&x, &y}) {
        if (t->size(3) > 1 && t->stride(3) != 1) t->fail("has channels that are not adjacent");
    }
    x.typed(dtype);
    if (cos.ndim() != 2) cos.fail("has not 2 dimensions (positions, pairs)");
    cos.beside(x).dense(DType::kFloat32);
    sin.beside(x).dense(DType::kFloat32).like(cos);
    if (2 * cos.size(1) > x.size(3)) cos.fail("has more pairs than x has channels");
    if (positions) {
        positions->beside(x).dense_int64().shaped({x.size(0), x.size(1)});
    } else if (cos.size(0) < x.size(1)) {
        cos.fail("has fewer rows than x has tokens");
    }
    require_same_or_disjoint(y, x);
    require_disjoint({&y}, {&cos, &sin, pointer_or_null(positions)});
    require_backend(x);
    const Rope args{dtype,
                    x.size(0),
                    x.size(1),
                    x.size(2),
                    x.size(3),
                    2 * cos.size(1),
                    interleaved,
                    inverse,
                    x.data(),
                    strides_of(x),
                    cos.data_as<float>(),
                    sin.data_as<float>(),
                    cos.size(0),
                    static_cast<const std::int64_t*>(data_or_null(positions)),
                    y.data(),
                    strides_of(y)};
    FASTLLM_RUN(x, rope, args, stream);
}

}  // namespace
}  // namespace fastllm::bindings

FASTLLM_BINDING(rope) {
    m.def("rope", &fastllm::bindings::rope, py::arg("x"), py::arg("cos"), py::arg("sin"),
          py::arg("positions"), py::arg("y"), py::arg("interleaved"), py::arg("inverse"),
          py::arg("stream") = 0);
}
