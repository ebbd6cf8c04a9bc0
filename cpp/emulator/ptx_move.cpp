// Moves of registers, selection, comparison.
#include <string>
#include <vector>

#include "ptx_operations.hpp"

namespace emulator::ptx {
namespace {

Flow select(Warp& w, const Instruction& i, std::uint32_t lanes) {
    std::uint64_t* to = w.row(i.rows[0]);
    const std::uint64_t* a = w.row(i.rows[1]);
    const std::uint64_t* b = w.row(i.rows[2]);
    const std::uint64_t* which = w.row(i.rows[3]);
    for_lanes(lanes, [&](unsigned l) { to[l] = which[l] != 0 ? a[l] : b[l]; });
    return Flow::kNext;
}

// mov of a vector: number of parts in `elements`, bits of each in `bytes`.
Flow pack(Warp& w, const Instruction& i, std::uint32_t lanes) {
    std::uint64_t* to = w.row(i.rows[0]);
    const std::uint64_t mask = (std::uint64_t{1} << i.bytes) - 1;
    for_lanes(lanes, [&](unsigned l) {
        std::uint64_t result = 0;
        for (unsigned n = 0; n < i.elements; ++n) {
            result |= (w.row(i.rows[1 + n])[l] & mask) << (n * i.bytes);
        }
        to[l] = result;
    });
    return Flow::kNext;
}

Flow unpack(Warp& w, const Instruction& i, std::uint32_t lanes) {
    const std::uint64_t* from = w.row(i.rows[i.elements]);
    const std::uint64_t mask = (std::uint64_t{1} << i.bytes) - 1;
    for_lanes(lanes, [&](unsigned l) {
        const std::uint64_t value = from[l];
        for (unsigned n = 0; n < i.elements; ++n) {
            w.row(i.rows[n])[l] = value >> (n * i.bytes) & mask;
        }
    });
    return Flow::kNext;
}

std::vector<std::string> parts_of(const std::string& vector) {
    return split_operands(std::string_view(vector).substr(1, vector.size() - 2));
}

void move(Decoding& d, Instruction& out) {
    const Type type = d.take_type();
    require_operands(d, 2);
    const bool to_vector = d.operand(0)[0] == '{';
    const bool from_vector = d.operand(1)[0] == '{';
    if (!to_vector && !from_vector) {
        plain_operands(d, out);
        out.run =
            type.kind == 'p' ? &unary<std::uint8_t, Identity> : &unary<std::uint64_t, Identity>;
        return;
    }
    const std::vector<std::string> parts = parts_of(d.operand(to_vector ? 0 : 1));
    if (type.bits > 64 || parts.size() > 4 || (to_vector && from_vector)) d.refuse();
    out.elements = static_cast<std::uint8_t>(parts.size());
    out.bytes = static_cast<std::uint8_t>(type.bytes() * 8 / static_cast<int>(parts.size()));
    for (std::size_t n = 0; n < parts.size(); ++n) {
        out.rows[n + (to_vector ? 0 : 1)] =
            to_vector ? d.destination(parts[n]) : d.source(parts[n]);
    }
    if (to_vector)
        out.rows[parts.size()] = d.source(d.operand(1));
    else
        out.rows[0] = d.destination(d.operand(0));
    out.run = to_vector ? &unpack : &pack;
}

// --- comparison ----------------------------------------------------------------------------------

enum class Relation : std::uint8_t { kEq, kNe, kLt, kLe, kGt, kGe, kNumbers, kNan };

template <class T>
bool compare(Relation relation, bool unordered, T a, T b) {
    if constexpr (kFloat<T>) {
        const bool nan = a != a || b != b;
        if (relation == Relation::kNumbers) return !nan;
        if (relation == Relation::kNan) return nan;
        if (nan) return unordered;
    }
    switch (relation) {
        case Relation::kEq:
            return a == b;
        case Relation::kNe:
            return a != b;
        case Relation::kLt:
            return a < b;
        case Relation::kLe:
            return a <= b;
        case Relation::kGt:
            return a > b;
        default:
            return a >= b;
    }
}

// rows: p, q (or none), a, b, c (or none). number: the relation, 16 if unordered; detail: how c
// takes part.
template <class T, class Value>
Flow set_predicate(Warp& w, const Instruction& i, std::uint32_t lanes) {
    const auto relation = static_cast<Relation>(i.number & 15);
    const bool unordered = (i.number & 16) != 0;
    for_lanes(lanes, [&](unsigned l) {
        const auto value = [&](Row r) {
            if constexpr (std::is_same_v<T, Value>)
                return get<T>(w.row(r)[l]);
            else
                return fastllm::to_float(get<T>(w.row(r)[l]));
        };
        bool holds = compare(relation, unordered, value(i.rows[2]), value(i.rows[3]));
        bool other = !holds;
        if (i.detail != 0) {
            const bool c = (w.row(i.rows[4])[l] != 0) != ((i.number & 32) != 0);
            const auto combine = [&](bool p) {
                return i.detail == 1 ? (p && c) : i.detail == 2 ? (p || c) : p != c;
            };
            holds = combine(holds);
            other = combine(other);
        }
        if (i.rows[0] != kNoRow) w.row(i.rows[0])[l] = holds;
        if (i.rows[1] != kNoRow) w.row(i.rows[1])[l] = other;
    });
    return Flow::kNext;
}

void comparison(Decoding& d, Instruction& out) {
    static constexpr std::pair<std::string_view, int> kRelations[] = {
        {"eq", 0},   {"ne", 1},   {"lt", 2},   {"le", 3},   {"gt", 4},   {"ge", 5},
        {"num", 6},  {"nan", 7},  {"lo", 2},   {"ls", 3},   {"hi", 4},   {"hs", 5},
        {"equ", 16}, {"neu", 17}, {"ltu", 18}, {"leu", 19}, {"gtu", 20}, {"geu", 21}};
    bool found = false;
    for (const auto& [name, number] : kRelations) {
        if (found || !d.take(name)) continue;
        out.number = static_cast<std::uint32_t>(number);
        found = true;
    }
    if (!found) d.refuse();
    out.detail = d.take("and") ? 1 : d.take("or") ? 2 : d.take("xor") ? 3 : 0;
    d.take("ftz");
    const Type type = d.take_type();
    require_operands(d, out.detail != 0 ? 4 : 3);
    const std::string& both = d.operand(0);
    const std::size_t bar = both.find('|');
    out.rows[0] = d.destination(both.substr(0, bar));
    out.rows[1] = bar == both.npos ? kNoRow : d.destination(both.substr(bar + 1));
    out.rows[2] = d.source(d.operand(1));
    out.rows[3] = d.source(d.operand(2));
    if (out.detail != 0) {
        const bool negated = d.operand(3)[0] == '!';
        out.number |= negated ? 32 : 0;
        out.rows[4] = d.source(d.operand(3).substr(negated ? 1 : 0));
    }
    if (type.kind == 'h' && !type.pair)
        out.run = &set_predicate<bfloat16, float>;
    else if (type.kind == 'f' && type.bits == 16 && !type.pair)
        out.run = &set_predicate<float16, float>;
    else if (type.kind == 'f' && type.bits == 32)
        out.run = &set_predicate<float, float>;
    else if (type.kind == 'f' && type.bits == 64)
        out.run = &set_predicate<double, double>;
    else
        out.run = with_integer(d, type, []<class T>() -> Handler { return &set_predicate<T, T>; });
}

}  // namespace

bool decode_move(std::string_view opcode, Decoding& d, Instruction& out) {
    if (opcode == "mov")
        move(d, out);
    else if (opcode == "setp")
        comparison(d, out);
    else if (opcode == "selp") {
        d.take_type();
        plain_operands(d, out);
        require_operands(d, 4);
        out.run = &select;
    } else {
        return false;
    }
    return true;
}

}  // namespace emulator::ptx
