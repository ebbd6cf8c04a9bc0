#include "fastllm/attention.hpp"

#include "binding.hpp"
#include "dlpack_tensor.hpp"

namespace py = pybind11;

namespace fastllm::bindings {
namespace {

// float32 (batch, length, heads, dim) on the CPU, with adjacent channels.
Heads heads_of(const DlpackTensor& t) {
    if (t.ndim() != 4) t.fail("has not the shape (batch, length, heads, dim)");
    if (t.device() != Device::kCpu) t.fail("is not on the CPU");
    t.typed(DType::kFloat32);
    if (!cpu::attention_takes(t.size(3))) {
        t.fail("has heads whose dim is not a multiple of 16 up to 256");
    }
    if (t.stride(3) != 1) t.fail("has channels that are not adjacent");
    return {t.data_as<float>(), t.stride(0), t.stride(1), t.stride(2)};
}

void require_heads(const DlpackTensor& q, const DlpackTensor& k, const DlpackTensor& v) {
    k.shaped({q.size(0), q.size(1), k.size(2), q.size(3)});
    v.like(k);
    if (k.size(2) < 1 || q.size(2) % k.size(2) != 0) {
        k.fail("has a number of heads that does not divide that of q");
    }
}

void attention_fwd(py::handle q_, py::handle k_, py::handle v_, py::handle out_, py::handle lse_,
                   float scale) {
    const char* op = "attention_fwd";
    const DlpackTensor q(op, "q", q_);
    const DlpackTensor k(op, "k", k_);
    const DlpackTensor v(op, "v", v_);
    const DlpackTensor out(op, "out", out_);
    const DlpackTensor lse(op, "lse", lse_);
    AttentionFwd args{};
    args.q = heads_of(q);
    args.k = heads_of(k);
    args.v = heads_of(v);
    require_heads(q, k, v);
    out.beside(q).dense(DType::kFloat32).like(q).writable();
    lse.beside(q).dense(DType::kFloat32).shaped({q.size(0), q.size(2), q.size(1)}).writable();
    require_disjoint({&out, &lse}, {&q, &k, &v});
    args.batch = q.size(0);
    args.length = q.size(1);
    args.heads = q.size(2);
    args.kv_heads = k.size(2);
    args.dim = q.size(3);
    args.scale = scale;
    args.out = out.data_as<float>();
    args.lse = lse.data_as<float>();
    py::gil_scoped_release unlocked;
    cpu::attention_fwd(args);
}

void attention_bwd(py::handle dout_, py::handle q_, py::handle k_, py::handle v_, py::handle out_,
                   py::handle lse_, py::handle dq_, py::handle dk_, py::handle dv_, float scale) {
    const char* op = "attention_bwd";
    const DlpackTensor dout(op, "dout", dout_);
    const DlpackTensor q(op, "q", q_);
    const DlpackTensor k(op, "k", k_);
    const DlpackTensor v(op, "v", v_);
    const DlpackTensor out(op, "out", out_);
    const DlpackTensor lse(op, "lse", lse_);
    const DlpackTensor dq(op, "dq", dq_);
    const DlpackTensor dk(op, "dk", dk_);
    const DlpackTensor dv(op, "dv", dv_);
    AttentionBwd args{};
    args.q = heads_of(q);
    args.k = heads_of(k);
    args.v = heads_of(v);
    args.out = heads_of(out);
    args.dout = heads_of(dout);
    require_heads(q, k, v);
    out.like(q);
    dout.like(q);
    lse.beside(q).dense(DType::kFloat32).shaped({q.size(0), q.size(2), q.size(1)});
    dq.beside(q).dense(DType::kFloat32).like(q).writable();
    for (const DlpackTensor* t : {&dk, &dv}) {
        t->beside(q).dense(DType::kFloat32).like(k).writable();
    }
    require_disjoint({&dq, &dk, &dv}, {&dout, &q, &k, &v, &out, &lse});
    args.batch = q.size(0);
    args.length = q.size(1);
    args.heads = q.size(2);
    args.kv_heads = k.size(2);
    args.dim = q.size(3);
    args.scale = scale;
    args.lse = lse.data_as<float>();
    args.dq = dq.data_as<float>();
    args.dk = dk.data_as<float>();
    args.dv = dv.data_as<float>();
    py::gil_scoped_release unlocked;
    cpu::attention_bwd(args);
}

}  // namespace
}  // namespace fastllm::bindings

FASTLLM_BINDING(attention) {
    using namespace fastllm::bindings;
    m.def("attention_fwd", &attention_fwd, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"),
          py::arg("lse"), py::arg("scale"));
    m.def("attention_bwd", &attention_bwd, py::arg("dout"), py::arg("q"), py::arg("k"),
          py::arg("v"), py::arg("out"), py::arg("lse"), py::arg("dq"), py::arg("dk"), py::arg("dv"),
          py::arg("scale"));
}
