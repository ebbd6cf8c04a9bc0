// How the core's failures look from Python. A failed system call (a full disk, a lost mount) is an
// OSError with errno and the file's name, as Python's own would be.
#include <exception>
#include <string>
#include <system_error>

#include "binding.hpp"

namespace py = pybind11;

namespace {

void translate(std::exception_ptr pointer) {
    try {
        if (pointer) std::rethrow_exception(pointer);
    } catch (const std::system_error& error) {
        const std::string reason = error.code().message();
        std::string file = error.what();  // FileWriter gives "FILE: reason"
        const std::string tail = ": " + reason;
        if (file.size() > tail.size() &&
            file.compare(file.size() - tail.size(), tail.size(), tail) == 0)
            file.resize(file.size() - tail.size());
        PyErr_SetObject(PyExc_OSError, py::make_tuple(error.code().value(), reason, file).ptr());
    }
}

}  // namespace

FASTLLM_BINDING(errors) { py::register_exception_translator(&translate); }
