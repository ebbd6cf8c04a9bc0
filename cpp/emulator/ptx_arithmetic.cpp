// Arithmetic of integers and floating-point numbers.
//
// Approximate instructions (ex2.approx, rsqrt.approx ...) are computed exactly and rounded once;
// denormals are kept where .ftz says otherwise.
#include "ptx_operations.hpp"

namespace emulator::ptx {
namespace {

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

void division(Decoding& d, Instruction& out) {
    d.take_any({"approx", "full", "rn"});
    binary_of_any<Divide>(d, out);
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

}  // namespace

bool decode_arithmetic(std::string_view opcode, Decoding& d, Instruction& out) {
    if (opcode == "add")
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
    else if (opcode == "neg")
        sign_change(d, out, false);
    else if (opcode == "abs")
        sign_change(d, out, true);
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
    else
        return false;
    return true;
}

}  // namespace emulator::ptx
