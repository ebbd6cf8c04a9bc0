#include "fastllm/matmul.hpp"

#include "binding.hpp"
#include "dlpack_tensor.hpp"

namespace py = pybind11;

namespace fastllm::bindings {
namespace {

void require_matrix(const DlpackTensor& t) {
    if (t.ndim() != 2) t.fail("has not two dimensions");
    if (t.device() != Device::kCpu) t.fail("is not on the CPU");
    t.typed(DType::kFloat32);
}

// Sets both strides of an operand. Those of dimensions of size 1 say nothing.
void set_strides(const DlpackTensor& t, std::int64_t& row, std::int64_t& col) {
    row = t.size(0) > 1 ? t.stride(0) : t.size(1);
    col = t.size(1) > 1 ? t.stride(1) : 1;
    if (t.size(0) <= 1 && col != 1) row = 1;
    if (row != 1 && col != 1) t.fail("has neither adjacent rows nor adjacent columns");
}

void matmul(py::handle a_, py::handle b_, py::handle c_, bool accumulate) {
    const char* op = "matmul";
    const DlpackTensor a(op, "a", a_);
    const DlpackTensor b(op, "b", b_);
    const DlpackTensor c(op, "c", c_);
    for (const DlpackTensor* t : {&a, &b, &c}) require_matrix(*t);
    b.shaped({a.size(1), b.size(1)});
    c.shaped({a.size(0), b.size(1)}).writable();
    if (c.size(1) > 1 && c.stride(1) != 1) c.fail("has columns that are not adjacent");
    if (c.size(0) > 1 && c.stride(0) < c.size(1)) c.fail("has rows that overlap");
    require_disjoint({&c}, {&a, &b});
    Matmul args{};
    args.m = a.size(0);
    args.n = b.size(1);
    args.k = a.size(1);
    args.a = a.data_as<float>();
    args.b = b.data_as<float>();
    args.c = c.data_as<float>();
    set_strides(a, args.a_row, args.a_col);
    set_strides(b, args.b_row, args.b_col);
    args.c_row = c.size(0) > 1 ? c.stride(0) : c.size(1);
    args.accumulate = accumulate;
    py::gil_scoped_release unlocked;
    cpu::matmul(args);
}

}  // namespace
}  // namespace fastllm::bindings

FASTLLM_BINDING(matmul) {
    using namespace fastllm::bindings;
    m.def("matmul", &matmul, py::arg("a"), py::arg("b"), py::arg("c"), py::arg("accumulate"));
    m.def("matmul_pays", &fastllm::cpu::matmul_pays);
}
