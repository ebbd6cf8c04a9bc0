// Each bindings/<op>.cpp registers what it adds to the module; module.cpp needs no change for a new
// op.
//
//     FASTLLM_BINDING(rmsnorm) { m.def("rmsnorm_fwd", …); }
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace fastllm::bindings {

using Binder = void (*)(pybind11::module_&);

inline std::vector<Binder>& binders() {
    static std::vector<Binder> list;
    return list;
}

struct Register {
    explicit Register(Binder binder) { binders().push_back(binder); }
};

}  // namespace fastllm::bindings

#define FASTLLM_BINDING(name)                                              \
    static void bind_##name(pybind11::module_& m);                         \
    static const fastllm::bindings::Register register_##name{bind_##name}; \
    static void bind_##name([[maybe_unused]] pybind11::module_& m)
