#include "fastllm/moe_permute.hpp"

#include "binding.hpp"
#include "dlpack_tensor.hpp"
#include "fastllm/cuda_device.hpp"

namespace py = pybind11;

namespace fastllm::bindings {
namespace {

// Checks slots (tokens, choices), and rows (tokens, cols) and (places, cols) of one dtype.
void require_moe(const DlpackTensor& slots, const DlpackTensor& of_tokens,
                 const DlpackTensor& of_places) {
    if (slots.ndim() != 2) slots.fail("has not 2 dimensions (tokens, choices)");
    if (of_tokens.ndim() != 2 || of_tokens.size(1) < 1) {
        of_tokens.fail("has not the shape (tokens, cols) with one column or more");
    }
    of_tokens.dense(of_tokens.dtype()).shaped({slots.size(0), of_tokens.size(1)});
    slots.beside(of_tokens).dense_int64();
    if (of_places.ndim() != 2) of_places.fail("has not 2 dimensions (places, cols)");
    of_places.beside(of_tokens)
        .dense(of_tokens.dtype())
        .shaped({of_places.size(0), of_tokens.size(1)});
    require_backend(of_tokens);
}

void moe_permute(py::handle slots_, py::handle x_, py::handle y_, std::uintptr_t stream) {
    const char* op = "moe_permute";
    const DlpackTensor slots(op, "slots", slots_);
    const DlpackTensor x(op, "x", x_);
    const DlpackTensor y(op, "y", y_);
    require_moe(slots, x, y);
    require_disjoint({&y.writable()}, {&slots, &x});
    const MoePermute args{x.dtype(), x.size(0), slots.size(1),
                          y.size(0), x.size(1), slots.data_as<std::int64_t>(),
                          x.data(),  y.data()};
    FASTLLM_RUN(x, moe_permute, args, stream);
}

void moe_combine(py::handle slots_, py::handle weights_, py::handle y_, py::handle out_,
                 std::uintptr_t stream) {
    const char* op = "moe_combine";
    const DlpackTensor slots(op, "slots", slots_);
    const DlpackTensor y(op, "y", y_);
    const DlpackTensor out(op, "out", out_);
    const MaybeTensor weights = optional_tensor(op, "weights", weights_);
    require_moe(slots, out, y);
    if (weights) weights->beside(out).dense(DType::kFloat32).like(slots);
    require_disjoint({&out.writable()}, {&slots, &y, pointer_or_null(weights)});
    const MoeCombine args{out.dtype(),
                          out.size(0),
                          slots.size(1),
                          y.size(0),
                          out.size(1),
                          slots.data_as<std::int64_t>(),
                          static_cast<const float*>(data_or_null(weights)),
                          y.data(),
                          out.data()};
    FASTLLM_RUN(out, moe_combine, args, stream);
}

void moe_combine_bwd(py::handle slots_, py::handle weights_, py::handle dout_, py::handle y_,
                     py::handle dy_, py::handle dweights_, std::uintptr_t stream) {
    const char* op = "moe_combine_bwd";
    const DlpackTensor slots(op, "slots", slots_);
    const DlpackTensor weights(op, "weights", weights_);
    const DlpackTensor dout(op, "dout", dout_);
    const DlpackTensor y(op, "y", y_);
    const DlpackTensor dy(op, "dy", dy_);
    const DlpackTensor dweights(op, "dweights", dweights_);
    require_moe(slots, dout, y);
    weights.beside(dout).dense(DType::kFloat32).like(slots);
    dweights.beside(dout).dense(DType::kFloat32).like(slots).writable();
    dy.beside(dout).dense(dout.dtype()).like(y).writable();
    require_disjoint({&dy, &dweights}, {&slots, &weights, &dout, &y});
    const MoeCombineBwd args{dout.dtype(),
                             dout.size(0),
                             slots.size(1),
                             y.size(0),
                             dout.size(1),
                             slots.data_as<std::int64_t>(),
                             weights.data_as<float>(),
                             dout.data(),
                             y.data(),
                             dy.data(),
                             dweights.data_as<float>()};
    FASTLLM_RUN(dout, moe_combine_bwd, args, stream);
}

}  // namespace
}  // namespace fastllm::bindings

FASTLLM_BINDING(moe_permute) {
    using namespace fastllm::bindings;
    m.def("moe_permute", &moe_permute, py::arg("slots"), py::arg("x"), py::arg("y"),
          py::arg("stream") = 0);
    m.def("moe_combine", &moe_combine, py::arg("slots"), py::arg("weights"), py::arg("y"),
          py::arg("out"), py::arg("stream") = 0);
    m.def("moe_combine_bwd", &moe_combine_bwd, py::arg("slots"), py::arg("weights"),
          py::arg("dout"), py::arg("y"), py::arg("dy"), py::arg("dweights"), py::arg("stream") = 0);
}
