// Arithmetic, logic, comparison and moves of registers.
//
// Approximate instructions (ex2.approx, rsqrt.approx ...) are computed exactly and rounded once;
// denormals are kept where .ftz says otherwise.
#include <algorithm>
#include <cfenv>
#include <cmath>
#include <limits>

#include "ptx_values.hpp"

namespace emulator::ptx {
namespace {

template <class T>
inline constexpr bool kFloat = std::is_floating_point_v<T>;

template <class T>
using Unsigned = std::make_unsigned_t<T>;

struct Add {
    template <class T>
    T operator()(T a, T b) const {
        if constexpr (kFloat<T>)
            return a + b;
        else
            return static_cast<T>(static_cast<std::uint64_t>(a) + static_cast<std::uint64_t>(b));
    }
};
struct Subtract {
    template <class T>
    T operator()(T a, T b) const {
        if constexpr (kFloat<T>)
            return a - b;
        else
            return static_cast<T>(static_cast<std::uint64_t>(a) - static_cast<std::uint64_t>(b));
    }
};
struct Multiply {
    template <class T>
    T operator()(T a, T b) const {
        if constexpr (kFloat<T>)
            return a * b;
        else
            return static_cast<T>(static_cast<std::uint64_t>(a) * static_cast<std::uint64_t>(b));
    }
};
struct MultiplyHigh {
    template <class T>
    T operator()(T a, T b) const {
        using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
        return static_cast<T>((static_cast<Wide>(a) * static_cast<Wide>(b)) >> (8 * sizeof(T)));
    }
};
struct Divide {
    template <class T>
    T operator()(T a, T b) const {
        if constexpr (kFloat<T>)
            return a / b;
        else {
            if (b == 0) return static_cast<T>(-1);
            if constexpr (std::is_signed_v<T>) {
                if (b == -1) return Subtract{}(T{0}, a);
            }
            return static_cast<T>(a / b);
        }
    }
};
struct Remainder {
    template <class T>
    T operator()(T a, T b) const {
        if (b == 0) return a;
        if constexpr (std::is_signed_v<T>) {
            if (b == -1) return 0;
        }
        return static_cast<T>(a % b);
    }
};
struct Minimum {
    template <class T>
    T operator()(T a, T b) const {
        if constexpr (kFloat<T>)
            return std::fmin(a, b);
        else
            return std::min(a, b);
    }
};
struct Maximum {
    template <class T>
    T operator()(T a, T b) const {
        if constexpr (kFloat<T>)
            return std::fmax(a, b);
        else
            return std::max(a, b);
    }
};
template <class Op>  // .NaN: a NaN operand makes the result NaN
struct PropagateNan {
    template <class T>
    T operator()(T a, T b) const {
        return a != a ? a : b != b ? b : Op{}(a, b);
    }
};
struct And {
    template <class T>
    T operator()(T a, T b) const {
        return static_cast<T>(a & b);
    }
};
struct Or {
    template <class T>
    T operator()(T a, T b) const {
        return static_cast<T>(a | b);
    }
};
struct Xor {
    template <class T>
    T operator()(T a, T b) const {
        return static_cast<T>(a ^ b);
    }
};
struct Not {
    template <class T>
    T operator()(T a) const {
        return static_cast<T>(~a);
    }
};
struct NotPredicate {
    std::uint8_t operator()(std::uint8_t a) const { return a == 0; }
};
struct Negate {
    template <class T>
    T operator()(T a) const {
        if constexpr (kFloat<T>)
            return -a;
        else
            return Subtract{}(T{0}, a);
    }
};
struct Absolute {
    template <class T>
    T operator()(T a) const {
        if constexpr (kFloat<T>)
            return std::fabs(a);
        else
            return a < 0 ? Subtract{}(T{0}, a) : a;
    }
};
struct Identity {
    template <class T>
    T operator()(T a) const {
        return a;
    }
};
struct FusedMultiplyAdd {
    template <class T>
    T operator()(T a, T b, T c) const {
        return std::fma(a, b, c);
    }
};
// .rm, which expf uses. Volatile: the compiler knows nothing of the rounding mode.
struct FusedMultiplyAddDown {
    template <class T>
    T operator()(T a, T b, T c) const {
        volatile T x = a;
        std::fesetround(FE_DOWNWARD);
        volatile T result = std::fma(x, b, c);
        std::fesetround(FE_TONEAREST);
        return result;
    }
};
struct MultiplyAddLow {
    template <class T>
    T operator()(T a, T b, T c) const {
        return Add{}(Multiply{}(a, b), c);
    }
};
struct MultiplyAddHigh {
    template <class T>
    T operator()(T a, T b, T c) const {
        return Add{}(MultiplyHigh{}(a, b), c);
    }
};
struct FunnelLeft {  // of high:low = c:b; the shift is clamped or wrapped by the caller
    static std::uint32_t of(std::uint64_t both, unsigned by) {
        return static_cast<std::uint32_t>((by >= 32 ? both << 32 : both << by) >> 32);
    }
};

#define FLOAT_FUNCTION(Name, expression) \
    struct Name {                        \
        template <class T>               \
        T operator()(T x) const {        \
            return expression;           \
        }                                \
    };
FLOAT_FUNCTION(Reciprocal, T{1} / x)
FLOAT_FUNCTION(SquareRoot, std::sqrt(x))
FLOAT_FUNCTION(ReciprocalRoot, T{1} / std::sqrt(x))
FLOAT_FUNCTION(PowerOfTwo, std::exp2(x))
FLOAT_FUNCTION(LogarithmTwo, std::log2(x))
FLOAT_FUNCTION(Sine, std::sin(x))
FLOAT_FUNCTION(Cosine, std::cos(x))
FLOAT_FUNCTION(HyperbolicTangent, std::tanh(x))
#undef FLOAT_FUNCTION

// Half precision is computed in float and rounded; of two halves packed in 32 bits, each.
template <class H, class Op, int kSources>
Flow half_operation(Warp& w, const Instruction& i, std::uint32_t lanes) {
    std::uint64_t* to = w.row(i.rows[0]);
    const std::uint64_t* a = w.row(i.rows[1]);
    const std::uint64_t* b = kSources > 1 ? w.row(i.rows[2]) : a;
    const std::uint64_t* c = kSources > 2 ? w.row(i.rows[3]) : a;
    const unsigned halves = i.detail;
    for_lanes(lanes, [&](unsigned l) {
        std::uint64_t out = 0;
        for (unsigned h = 0; h < halves; ++h) {
            const auto part = [&](const std::uint64_t* r) {
                return fastllm::to_float(H{static_cast<std::uint16_t>(r[l] >> (16 * h))});
            };
            float value;
            if constexpr (kSources == 1)
                value = Op{}(part(a));
            else if constexpr (kSources == 2)
                value = Op{}(part(a), part(b));
            else
                value = Op{}(part(a), part(b), part(c));
            out |= std::uint64_t{fastllm::from_float<H>(value).bits} << (16 * h);
        }
        to[l] = out;
    });
    return Flow::kNext;
}

template <class Op, int kSources>
Handler float_handler(Decoding& d, const Type& type, Instruction& out) {
    out.detail = type.pair ? 2 : 1;
    if (type.kind == 'h') return &half_operation<bfloat16, Op, kSources>;
    if (type.kind == 'f' && type.bits == 16) return &half_operation<float16, Op, kSources>;
    if (type.kind != 'f') d.refuse();
    if constexpr (kSources == 1) {
        return type.bits == 32 ? &unary<float, Op> : &unary<double, Op>;
    } else if constexpr (kSources == 2) {
        return type.bits == 32 ? &binary<float, Op> : &binary<double, Op>;
    } else {
        return type.bits == 32 ? &ternary<float, Op> : &ternary<double, Op>;
    }
}

bool is_float(const Type& type) { return type.kind == 'f' || type.kind == 'h'; }

template <class Op>
void binary_of_any(Decoding& d, Instruction& out) {
    d.take_any({"rn"});
    d.take("ftz");
    const Type type = d.take_type();
    plain_operands(d, out);
    require_operands(d, 3);
    out.run = is_float(type)
                  ? float_handler<Op, 2>(d, type, out)
                  : with_integer(d, type, []<class T>() -> Handler { return &binary<T, Op>; });
}

template <class Op>
void binary_of_integers(Decoding& d, Instruction& out) {
    const Type type = d.take_type();
    plain_operands(d, out);
    require_operands(d, 3);
    out.run = with_integer(d, type, []<class T>() -> Handler { return &binary<T, Op>; });
}

template <class Op>
void binary_of_bits(Decoding& d, Instruction& out) {
    const Type type = d.take_type();
    plain_operands(d, out);
    require_operands(d, 3);
    out.run = type.kind == 'p'
                  ? &binary<std::uint8_t, Op>
                  : with_integer(d, type, []<class T>() -> Handler { return &binary<T, Op>; });
}

template <class Op>
void extremum(Decoding& d, Instruction& out) {
    d.take("ftz");
    const bool nan = d.take("NaN");
    const Type type = d.take_type();
    plain_operands(d, out);
    require_operands(d, 3);
    if (!is_float(type)) {
        out.run = with_integer(d, type, []<class T>() -> Handler { return &binary<T, Op>; });
    } else if (nan) {
        out.run = float_handler<PropagateNan<Op>, 2>(d, type, out);
    } else {
        out.run = float_handler<Op, 2>(d, type, out);
    }
}

template <class Op>
void float_function(Decoding& d, Instruction& out) {
    d.take_any({"approx", "rn"});
    d.take("ftz");
    const Type type = d.take_type();
    plain_operands(d, out);
    require_operands(d, 2);
    out.run = float_handler<Op, 1>(d, type, out);
}

// A product of twice the width, with or without a third operand of that width.
template <class T, bool kAdd>
Flow multiply_wide(Warp& w, const Instruction& i, std::uint32_t lanes) {
    using Wide = std::conditional_t<std::is_signed_v<T>, std::int64_t, std::uint64_t>;
    std::uint64_t* to = w.row(i.rows[0]);
    const std::uint64_t* a = w.row(i.rows[1]);
    const std::uint64_t* b = w.row(i.rows[2]);
    const std::uint64_t* c = kAdd ? w.row(i.rows[3]) : a;
    for_lanes(lanes, [&](unsigned l) {
        const auto product = static_cast<std::uint64_t>(Wide{get<T>(a[l])} * Wide{get<T>(b[l])});
        to[l] = product + (kAdd ? c[l] : 0);
    });
    return Flow::kNext;
}

template <bool kAdd>
void product(Decoding& d, Instruction& out) {
    const std::string part = d.take_any({"lo", "hi", "wide"});
    const bool down = kAdd && d.take("rm");
    d.take_any({"rn"});
    d.take("ftz");
    const Type type = d.take_type();
    plain_operands(d, out);
    require_operands(d, kAdd ? 4 : 3);
    if (is_float(type)) {
        if (!part.empty() || (down && type.bits == 16)) d.refuse();
        if (down) {
            out.run = float_handler<FusedMultiplyAddDown, 3>(d, type, out);
            return;
        }
        if constexpr (kAdd)
            out.run = float_handler<FusedMultiplyAdd, 3>(d, type, out);
        else
            out.run = float_handler<Multiply, 2>(d, type, out);
    } else if (part == "wide") {
        if (type.bits > 32) d.refuse();
        out.run =
            with_integer(d, type, []<class T>() -> Handler { return &multiply_wide<T, kAdd>; });
    } else if (part.empty()) {
        d.refuse();
    } else {
        const bool high = part == "hi";
        out.run = with_integer(d, type, [high]<class T>() -> Handler {
            if constexpr (kAdd)
                return high ? &ternary<T, MultiplyAddHigh> : &ternary<T, MultiplyAddLow>;
            else
                return high ? &binary<T, MultiplyHigh> : &binary<T, Multiply>;
        });
    }
}

template <class T, bool kLeft>
Flow shift(Warp& w, const Instruction& i, std::uint32_t lanes) {
    std::uint64_t* to = w.row(i.rows[0]);
    const std::uint64_t* a = w.row(i.rows[1]);
    const std::uint64_t* b = w.row(i.rows[2]);
    for_lanes(lanes, [&](unsigned l) {
        const auto by = static_cast<std::uint32_t>(b[l]);
        const T value = get<T>(a[l]);
        constexpr unsigned kBits = 8 * sizeof(T);
        T result;
        if (by >= kBits)
            result = !kLeft && value < 0 ? static_cast<T>(-1) : T{0};
        else if (kLeft)
            result = static_cast<T>(static_cast<Unsigned<T>>(value) << by);
        else
            result = static_cast<T>(value >> by);
        to[l] = bits_of<T>(result);
    });
    return Flow::kNext;
}

template <bool kLeft, bool kWrap>
Flow funnel_shift(Warp& w, const Instruction& i, std::uint32_t lanes) {
    std::uint64_t* to = w.row(i.rows[0]);
    for_lanes(lanes, [&](unsigned l) {
        const std::uint64_t both =
            (w.row(i.rows[2])[l] << 32) | (w.row(i.rows[1])[l] & 0xffffffffu);
        const auto count = static_cast<std::uint32_t>(w.row(i.rows[3])[l]);
        const unsigned by = kWrap ? count % 32 : std::min(count, 32u);
        to[l] = kLeft ? FunnelLeft::of(both, by) : static_cast<std::uint32_t>(both >> by);
    });
    return Flow::kNext;
}

Flow lop3(Warp& w, const Instruction& i, std::uint32_t lanes) {
    std::uint64_t* to = w.row(i.rows[0]);
    for_lanes(lanes, [&](unsigned l) {
        const std::uint64_t in[3] = {w.row(i.rows[1])[l], w.row(i.rows[2])[l], w.row(i.rows[3])[l]};
        std::uint64_t result = 0;
        for (unsigned term = 0; term < 8; ++term) {
            if ((i.number >> term & 1) == 0) continue;
            result |= (term & 4 ? in[0] : ~in[0]) & (term & 2 ? in[1] : ~in[1]) &
                      (term & 1 ? in[2] : ~in[2]);
        }
        to[l] = result & 0xffffffffu;
    });
    return Flow::kNext;
}

Flow permute_bytes(Warp& w, const Instruction& i, std::uint32_t lanes) {
    std::uint64_t* to = w.row(i.rows[0]);
    for_lanes(lanes, [&](unsigned l) {
        const std::uint64_t both =
            (w.row(i.rows[2])[l] << 32) | (w.row(i.rows[1])[l] & 0xffffffffu);
        std::uint32_t result = 0;
        for (unsigned n = 0; n < 4; ++n) {
            const auto selector = static_cast<unsigned>(w.row(i.rows[3])[l] >> (4 * n)) & 15;
            auto byte = static_cast<std::uint32_t>(both >> (8 * (selector & 7))) & 0xff;
            if ((selector & 8) != 0) byte = (byte & 0x80) != 0 ? 0xff : 0;
            result |= byte << (8 * n);
        }
        to[l] = result;
    });
    return Flow::kNext;
}

template <class T>
Flow extract_bits(Warp& w, const Instruction& i, std::uint32_t lanes) {
    std::uint64_t* to = w.row(i.rows[0]);
    for_lanes(lanes, [&](unsigned l) {
        constexpr unsigned kBits = 8 * sizeof(T);
        const T value = get<T>(w.row(i.rows[1])[l]);
        const unsigned begin = w.row(i.rows[2])[l] & 0xff;
        const unsigned length = w.row(i.rows[3])[l] & 0xff;
        const bool negative = std::is_signed_v<T> && length > 0 &&
                              (value >> std::min(begin + length - 1, kBits - 1) & 1) != 0;
        Unsigned<T> result = negative ? static_cast<Unsigned<T>>(~Unsigned<T>{0}) : 0;
        for (unsigned n = 0; n < std::min(length, kBits); ++n) {
            if (begin + n >= kBits) break;
            const Unsigned<T> bit = static_cast<Unsigned<T>>(value) >> (begin + n) & 1;
            result = static_cast<Unsigned<T>>((result & ~(Unsigned<T>{1} << n)) | (bit << n));
        }
        to[l] = bits_of<T>(static_cast<T>(result));
    });
    return Flow::kNext;
}

template <class T>
Flow insert_bits(Warp& w, const Instruction& i, std::uint32_t lanes) {
    std::uint64_t* to = w.row(i.rows[0]);
    for_lanes(lanes, [&](unsigned l) {
        const T a = get<T>(w.row(i.rows[1])[l]);
        T result = get<T>(w.row(i.rows[2])[l]);
        const unsigned begin = w.row(i.rows[3])[l] & 0xff;
        const unsigned length = w.row(i.rows[4])[l] & 0xff;
        for (unsigned n = 0; n < length && begin + n < 8 * sizeof(T); ++n) {
            result =
                static_cast<T>((result & ~(T{1} << (begin + n))) | ((a >> n & 1) << (begin + n)));
        }
        to[l] = bits_of<T>(result);
    });
    return Flow::kNext;
}

template <class T, int kWhat>  // 0 population count, 1 leading zeros, 2 reversal
Flow bit_count(Warp& w, const Instruction& i, std::uint32_t lanes) {
    std::uint64_t* to = w.row(i.rows[0]);
    const std::uint64_t* a = w.row(i.rows[1]);
    for_lanes(lanes, [&](unsigned l) {
        const auto value = static_cast<Unsigned<T>>(get<T>(a[l]));
        if constexpr (kWhat == 0)
            to[l] = static_cast<std::uint64_t>(std::popcount(value));
        else if constexpr (kWhat == 1)
            to[l] = static_cast<std::uint64_t>(std::countl_zero(value));
        else {
            std::uint64_t reversed = 0;
            for (unsigned n = 0; n < 8 * sizeof(T); ++n) {
                reversed |= (static_cast<std::uint64_t>(value) >> n & 1) << (8 * sizeof(T) - 1 - n);
            }
            to[l] = reversed;
        }
    });
    return Flow::kNext;
}

template <int kWhat>
void count_bits(Decoding& d, Instruction& out) {
    const Type type = d.take_type();
    plain_operands(d, out);
    require_operands(d, 2);
    out.run = with_integer(d, type, []<class T>() -> Handler { return &bit_count<T, kWhat>; });
}

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

void division(Decoding& d, Instruction& out) {
    d.take_any({"approx", "full", "rn"});
    binary_of_any<Divide>(d, out);
}

void shift_by(Decoding& d, Instruction& out, bool left) {
    const Type type = d.take_type();
    plain_operands(d, out);
    require_operands(d, 3);
    out.run = with_integer(d, type, [left]<class T>() -> Handler {
        return left ? &shift<T, true> : &shift<T, false>;
    });
}

void funnel(Decoding& d, Instruction& out) {
    const bool left = d.take("l");
    if (!left && !d.take("r")) d.refuse();
    const bool wrap = d.take("wrap");
    if (!wrap && !d.take("clamp")) d.refuse();
    if (d.take_type().bits != 32) d.refuse();
    plain_operands(d, out);
    require_operands(d, 4);
    out.run = left ? (wrap ? &funnel_shift<true, true> : &funnel_shift<true, false>)
                   : (wrap ? &funnel_shift<false, true> : &funnel_shift<false, false>);
}

void sign_change(Decoding& d, Instruction& out, bool absolute) {
    d.take("ftz");
    const Type type = d.take_type();
    plain_operands(d, out);
    require_operands(d, 2);
    if (is_float(type)) {
        out.run = absolute ? float_handler<Absolute, 1>(d, type, out)
                           : float_handler<Negate, 1>(d, type, out);
    } else {
        out.run = with_integer(d, type, [absolute]<class T>() -> Handler {
            return absolute ? &unary<T, Absolute> : &unary<T, Negate>;
        });
    }
}

void complement(Decoding& d, Instruction& out) {
    const Type type = d.take_type();
    plain_operands(d, out);
    require_operands(d, 2);
    out.run = type.kind == 'p'
                  ? &unary<std::uint8_t, NotPredicate>
                  : with_integer(d, type, []<class T>() -> Handler { return &unary<T, Not>; });
}

void bit_field(Decoding& d, Instruction& out, bool insert) {
    const Type type = d.take_type();
    plain_operands(d, out);
    require_operands(d, insert ? 5 : 4);
    if (type.bits < 32) d.refuse();
    out.run = with_integer(d, type, [insert]<class T>() -> Handler {
        return insert ? &insert_bits<T> : &extract_bits<T>;
    });
}

}  // namespace

bool decode_arithmetic(std::string_view opcode, Decoding& d, Instruction& out) {
    if (opcode == "mov")
        move(d, out);
    else if (opcode == "add")
        binary_of_any<Add>(d, out);
    else if (opcode == "sub")
        binary_of_any<Subtract>(d, out);
    else if (opcode == "mul")
        product<false>(d, out);
    else if (opcode == "mad" || opcode == "fma")
        product<true>(d, out);
    else if (opcode == "div")
        division(d, out);
    else if (opcode == "rem")
        binary_of_integers<Remainder>(d, out);
    else if (opcode == "min")
        extremum<Minimum>(d, out);
    else if (opcode == "max")
        extremum<Maximum>(d, out);
    else if (opcode == "and")
        binary_of_bits<And>(d, out);
    else if (opcode == "or")
        binary_of_bits<Or>(d, out);
    else if (opcode == "xor")
        binary_of_bits<Xor>(d, out);
    else if (opcode == "not")
        complement(d, out);
    else if (opcode == "neg")
        sign_change(d, out, false);
    else if (opcode == "abs")
        sign_change(d, out, true);
    else if (opcode == "shl")
        shift_by(d, out, true);
    else if (opcode == "shr")
        shift_by(d, out, false);
    else if (opcode == "shf")
        funnel(d, out);
    else if (opcode == "bfe")
        bit_field(d, out, false);
    else if (opcode == "bfi")
        bit_field(d, out, true);
    else if (opcode == "popc")
        count_bits<0>(d, out);
    else if (opcode == "clz")
        count_bits<1>(d, out);
    else if (opcode == "brev")
        count_bits<2>(d, out);
    else if (opcode == "setp")
        comparison(d, out);
    else if (opcode == "rcp")
        float_function<Reciprocal>(d, out);
    else if (opcode == "sqrt")
        float_function<SquareRoot>(d, out);
    else if (opcode == "rsqrt")
        float_function<ReciprocalRoot>(d, out);
    else if (opcode == "ex2")
        float_function<PowerOfTwo>(d, out);
    else if (opcode == "lg2")
        float_function<LogarithmTwo>(d, out);
    else if (opcode == "sin")
        float_function<Sine>(d, out);
    else if (opcode == "cos")
        float_function<Cosine>(d, out);
    else if (opcode == "tanh")
        float_function<HyperbolicTangent>(d, out);
    else if (opcode == "selp") {
        d.take_type();
        plain_operands(d, out);
        require_operands(d, 4);
        out.run = &select;
    } else if (opcode == "lop3") {
        d.take_type();
        require_operands(d, 5);
        out.rows[0] = d.destination(d.operand(0));
        for (std::size_t i = 1; i < 4; ++i) out.rows[i] = d.source(d.operand(i));
        out.number = static_cast<std::uint32_t>(d.integer(d.operand(4)));
        out.run = &lop3;
    } else if (opcode == "prmt") {
        if (d.take_type().bits != 32) d.refuse();
        plain_operands(d, out);
        require_operands(d, 4);
        out.run = &permute_bytes;
    } else {
        return false;
    }
    return true;
}

}  // namespace emulator::ptx
