// Decoded kernels: what the interpreter executes.
//
// Every operand is a row: 32 values of 64 bits, one per lane of a warp. Registers, constants and
// special registers are rows alike, so an instruction only knows row numbers.
#pragma once

#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "ptx_syntax.hpp"

namespace emulator::ptx {

class Warp;
struct Instruction;

enum class Flow : std::uint8_t {
    kNext,    // lanes go on with the next instruction
    kBranch,  // `lanes` go to the target
    kExit,    // `lanes` have returned
    kWait,    // not executed: other lanes or warps must come first
};

// Executes an instruction for `lanes`, which are those of the warp that stand here and whose
// predicate holds.
using Handler = Flow (*)(Warp& warp, const Instruction& instruction, std::uint32_t lanes);

using Row = std::uint16_t;
inline constexpr Row kNoRow = 0xffff;

struct Instruction {
    static constexpr std::array<Row, 20> no_rows() {
        std::array<Row, 20> none{};
        for (Row& row : none) row = kNoRow;
        return none;
    }
    Handler run = nullptr;
    // Destinations first, then sources, in the order of the text.
    std::array<Row, 20> rows = no_rows();
    std::vector<Row> accumulators;  // of wgmma
    std::int64_t offset = 0;        // of an address operand
    std::uint32_t target = 0;       // of a branch
    int line = 0;
    Row guard = kNoRow;
    bool guard_negated = false;
    Space space{};
    std::uint8_t elements = 1;          // of a vector
    std::uint8_t bytes = 0;             // of one element
    std::uint8_t detail = 0;            // of the handler's choosing
    std::uint32_t number = 0;           // likewise
    const std::string* text = nullptr;  // the opcode
};

// clang-format off
// The special registers that differ between lanes, warps or blocks.
enum class Special : std::uint8_t {
    kTidX, kTidY, kTidZ, kNtidX, kNtidY, kNtidZ, kCtaidX, kCtaidY, kCtaidZ,
    kNctaidX, kNctaidY, kNctaidZ, kLane, kWarp, kWarps, kMaskEq, kMaskLt, kMaskLe, kMaskGt,
    kMaskGe, kDynamicShared, kZero,
};
// clang-format on

struct Program {
    const Kernel* kernel = nullptr;
    std::vector<Instruction> code;
    std::size_t rows = 0;
    std::vector<std::pair<Row, std::uint64_t>> constants;
    std::vector<std::pair<Row, Special>> specials;
    std::size_t shared_bytes = 0;                             // static
    std::vector<std::pair<std::size_t, std::size_t>> shared;  // offset and bytes of each variable
    std::size_t dynamic_offset = 0;                           // where extern shared memory begins
    bool has_dynamic = false;
    std::vector<std::uint8_t> reached;  // of each instruction: whether a lane executed it
};

// Throws Unsupported for an instruction that the emulator does not execute.
std::unique_ptr<Program> decode(const Kernel& kernel, const Module& module);

// --- how the files of handlers add theirs --------------------------------------------------------

// What one opcode's decoder sees.
class Decoding {
  public:
    virtual ~Decoding() = default;
    // Parts of the opcode after its first, not yet taken.
    virtual bool take(std::string_view modifier) = 0;
    virtual Type take_type() = 0;
    virtual bool next_type(Type& type) = 0;  // the same, if there is one
    virtual std::string take_any(std::initializer_list<std::string_view> modifiers) = 0;
    virtual std::size_t operand_count() const = 0;
    virtual const std::string& operand(std::size_t i) const = 0;
    virtual Row destination(const std::string& operand) = 0;
    virtual Row source(const std::string& operand) = 0;
    virtual void address(const std::string& operand, Instruction& out, std::size_t row) = 0;
    virtual std::uint32_t label(const std::string& operand) = 0;
    virtual std::int64_t integer(const std::string& operand) = 0;
    [[noreturn]] void refuse() {
        throw_unsupported();
        std::abort();
    }

  protected:
    virtual void throw_unsupported() const = 0;
};

// `opcode` is the part before the first point. False if it is none of theirs.
bool decode_arithmetic(std::string_view opcode, Decoding& d, Instruction& out);
bool decode_bits(std::string_view opcode, Decoding& d, Instruction& out);
bool decode_move(std::string_view opcode, Decoding& d, Instruction& out);
bool decode_conversion(std::string_view opcode, Decoding& d, Instruction& out);
bool decode_memory(std::string_view opcode, Decoding& d, Instruction& out);
bool decode_async_copy(std::string_view opcode, Decoding& d, Instruction& out);
bool decode_warp(std::string_view opcode, Decoding& d, Instruction& out);
bool decode_matrix(std::string_view opcode, Decoding& d, Instruction& out);
bool decode_mbarrier(std::string_view opcode, Decoding& d, Instruction& out);
bool decode_wgmma(std::string_view opcode, Decoding& d, Instruction& out);
bool decode_cluster(std::string_view opcode, Decoding& d, Instruction& out);
bool decode_map_update(std::string_view opcode, Decoding& d, Instruction& out);
void decode_map_fence(Decoding& d, Instruction& out);  // fence.proxy.tensormap, after these words
void decode_bulk_copy(Decoding& d, Instruction& out);  // cp.async.bulk, after these words

}  // namespace emulator::ptx
