#include "fastllm/cpu_isa.hpp"

#include <string>

#include "binding.hpp"

namespace py = pybind11;

namespace {

using fastllm::cpu::Isa;
constexpr Isa kAll[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvx512};

}  // namespace

FASTLLM_BINDING(cpu_isa) {
    m.def("cpu_isa", [] { return std::string(name_of(fastllm::cpu::current_isa())); });
    m.def("cpu_isas", [] {
        py::list names;
        for (const Isa isa : kAll) {
            if (fastllm::cpu::supported(isa)) names.append(name_of(isa));
        }
        return names;
    });
    m.def(
        "set_cpu_isa",
        [](const std::string& name) {
            for (const Isa isa : kAll) {
                if (name == name_of(isa)) return fastllm::cpu::set_isa(isa);
            }
            throw py::value_error("unknown instruction set \"" + name +
                                  "\", expected portable, avx2 or avx512");
        },
        py::arg("name"));
}
