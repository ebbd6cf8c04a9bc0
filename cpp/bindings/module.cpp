#include "binding.hpp"

PYBIND11_MODULE(_core, m) {
    m.doc() = "The native core of fastllm. Use the names that the package fastllm_core exports.";
    for (const auto bind : fastllm::bindings::binders()) bind(m);
}
