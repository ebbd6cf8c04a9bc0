// PTX text as nvcc writes it, taken apart: modules, kernels, variables, statements. What the
// statements mean is ptx_decode.cpp's business.
//
// Source of the syntax: the PTX ISA reference, versions 7 to 9.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace emulator::ptx {

// Text that this emulator does not understand, by line: it is refused, never skipped.
struct Unsupported : std::runtime_error {
    Unsupported(int line, const std::string& what)
        : std::runtime_error("PTX line " + std::to_string(line) + ": " + what) {}
};

enum class Space : std::uint8_t { kGeneric, kGlobal, kShared, kLocal, kParam };

// A fundamental type: kind b, u, s, f (float), h (bfloat16), p (predicate); x2 for packed pairs.
struct Type {
    char kind = 'b';
    int bits = 32;
    bool pair = false;
    int bytes() const { return bits / 8 * (pair ? 2 : 1); }
    bool operator==(const Type&) const = default;
};
// False if the name (".f32" without its point) is no type.
bool parse_type(std::string_view name, Type& type);

struct Variable {
    std::string name;
    Space space{};
    std::size_t alignment = 1;
    std::size_t bytes = 0;
    std::size_t offset = 0;  // in its space; of module variables, an address
    bool dynamic = false;    // extern shared memory, sized by the launch
    std::vector<unsigned char> initial;
};

struct Statement {
    int line = 0;
    int scope = 0;
    bool is_label = false;
    bool guard_negated = false;
    std::string guard;   // predicate's name, or empty
    std::string opcode;  // or the label
    std::vector<std::string> operands;
};

struct Kernel {
    std::string name;
    std::vector<Variable> params;
    std::vector<Variable> shared;  // also the module's own
    std::vector<Variable> local;
    std::vector<int> parent_scope;  // of each scope; 0 is the body
    std::map<std::pair<int, std::string>, Type> registers;
    std::vector<Statement> statements;
    std::size_t param_bytes = 0;
    std::size_t local_bytes = 0;
    unsigned max_threads = 1024;
    unsigned required_threads = 0;
};

struct Module {
    std::string text;
    std::vector<std::unique_ptr<Kernel>> kernels;
    std::vector<Variable> variables;  // .global and .const
    int architecture = 0;             // 90 of sm_90a
};

// Throws Unsupported.
std::unique_ptr<Module> parse(std::string_view text);

// "a, {b, c}, [d+4]" at its outermost commas.
std::vector<std::string> split_operands(std::string_view text);

}  // namespace emulator::ptx
