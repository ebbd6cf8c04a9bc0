// cvt, cvta, isspacep.
#include <cmath>
#include <limits>

#include "ptx_values.hpp"

namespace emulator::ptx {
namespace {

// Rounding to an integral value: 'n' to nearest even, 'z' to zero, 'm' down, 'p' up.
double rounded(double value, char mode) {
    switch (mode) {
        case 'n':
            return std::nearbyint(value);
        case 'm':
            return std::floor(value);
        case 'p':
            return std::ceil(value);
        default:
            return std::trunc(value);
    }
}

template <class T>
T to_integer(double value, char mode) {
    const double r = rounded(value, mode);
    if (r != r) return 0;
    // The bounds as doubles may lie one beyond; what is not strictly inside is clamped.
    if (r <= static_cast<double>(std::numeric_limits<T>::lowest())) {
        return std::numeric_limits<T>::lowest();
    }
    if (r >= static_cast<double>(std::numeric_limits<T>::max()))
        return std::numeric_limits<T>::max();
    return static_cast<T>(r);
}

// A value on its way: float formats as double, integers as 64 bits with their sign.
struct Load {
    Type type;
    double real(std::uint64_t bits) const {
        if (type.kind == 'h') return fastllm::to_float(get<bfloat16>(bits));
        if (type.bits == 16) return fastllm::to_float(get<float16>(bits));
        return type.bits == 32 ? static_cast<double>(get<float>(bits)) : get<double>(bits);
    }
    std::uint64_t integer(std::uint64_t bits) const {
        const bool is_signed = type.kind == 's';
        switch (type.bits) {
            case 8:
                return is_signed ? bits_of(get<std::int8_t>(bits)) : get<std::uint8_t>(bits);
            case 16:
                return is_signed ? bits_of(get<std::int16_t>(bits)) : get<std::uint16_t>(bits);
            case 32:
                return is_signed ? bits_of(get<std::int32_t>(bits)) : get<std::uint32_t>(bits);
            default:
                return bits;
        }
    }
};

std::uint64_t store_real(const Type& type, double value) {
    if (type.kind == 'h') return fastllm::from_float<bfloat16>(static_cast<float>(value)).bits;
    if (type.bits == 16) return fastllm::from_float<float16>(static_cast<float>(value)).bits;
    if (type.bits == 32) return bits_of(static_cast<float>(value));
    return bits_of(value);
}

std::uint64_t store_real_integer(const Type& type, double value, char mode) {
    const bool is_signed = type.kind == 's';
    switch (type.bits) {
        case 8:
            return is_signed ? bits_of(to_integer<std::int8_t>(value, mode))
                             : to_integer<std::uint8_t>(value, mode);
        case 16:
            return is_signed ? bits_of(to_integer<std::int16_t>(value, mode))
                             : to_integer<std::uint16_t>(value, mode);
        case 32:
            return is_signed ? bits_of(to_integer<std::int32_t>(value, mode))
                             : to_integer<std::uint32_t>(value, mode);
        default:
            return is_signed ? bits_of(to_integer<std::int64_t>(value, mode))
                             : to_integer<std::uint64_t>(value, mode);
    }
}

constexpr char kKinds[] = {'u', 's', 'f', 'h'};
constexpr int kBits[] = {8, 16, 32, 64};

std::uint32_t code_of(Decoding& d, const Type& type) {
    for (std::uint32_t k = 0; k < 4; ++k) {
        for (std::uint32_t b = 0; b < 4; ++b) {
            if (!type.pair && kKinds[k] == type.kind && kBits[b] == type.bits) return k * 4 + b;
        }
    }
    d.refuse();
}

Type type_of(std::uint32_t code) { return {kKinds[code / 4], kBits[code % 4], false}; }

// number: the types' codes, 8 bits each; detail: the rounding mode, 128 added for .sat.
Flow convert(Warp& w, const Instruction& i, std::uint32_t lanes) {
    const Type to = type_of(i.number & 0xff);
    const Load from{type_of(i.number >> 8)};
    const bool to_real = to.kind == 'f' || to.kind == 'h';
    const bool from_real = from.type.kind == 'f' || from.type.kind == 'h';
    const bool saturate = (i.detail & 128) != 0;
    const char mode = static_cast<char>(i.detail & 127);
    std::uint64_t* out = w.row(i.rows[0]);
    const std::uint64_t* in = w.row(i.rows[1]);
    for_lanes(lanes, [&](unsigned l) {
        if (!from_real && !to_real) {
            out[l] = Load{to}.integer(from.integer(in[l]));
        } else if (from_real && to_real) {
            double value = from.real(in[l]);
            if (mode != 0) value = rounded(value, mode);
            if (saturate) value = value != value ? 0.0 : std::fmin(1.0, std::fmax(0.0, value));
            out[l] = store_real(to, value);
        } else if (from_real) {
            out[l] = store_real_integer(to, from.real(in[l]), mode);
        } else {
            const std::uint64_t value = from.integer(in[l]);
            const bool is_signed = from.type.kind == 's';
            // Straight to float: rounding to double first could round twice.
            const auto narrow = is_signed ? static_cast<float>(static_cast<std::int64_t>(value))
                                          : static_cast<float>(value);
            const auto wide = is_signed ? static_cast<double>(static_cast<std::int64_t>(value))
                                        : static_cast<double>(value);
            out[l] = store_real(to, to.bits == 64 ? wide : static_cast<double>(narrow));
        }
    });
    return Flow::kNext;
}

template <class H>
Flow pack_two(Warp& w, const Instruction& i, std::uint32_t lanes) {
    std::uint64_t* out = w.row(i.rows[0]);
    for_lanes(lanes, [&](unsigned l) {
        const auto half = [&](Row r) {
            return std::uint64_t{fastllm::from_float<H>(get<float>(w.row(r)[l])).bits};
        };
        out[l] = half(i.rows[1]) << 16 | half(i.rows[2]);
    });
    return Flow::kNext;
}

void conversion(Decoding& d, Instruction& out) {
    const std::string mode = d.take_any({"rni", "rzi", "rmi", "rpi"});
    const bool nearest = d.take("rn");
    d.take("ftz");
    const bool saturate = d.take("sat");
    const Type to = d.take_type();
    const Type from = d.take_type();
    plain_operands(d, out);
    if (to.pair) {
        require_operands(d, 3);
        if (!nearest || saturate || !(from == Type{'f', 32, false})) d.refuse();
        out.run = to.kind == 'h' ? &pack_two<bfloat16> : &pack_two<float16>;
        return;
    }
    require_operands(d, 2);
    const bool to_real = to.kind == 'f' || to.kind == 'h';
    const bool from_real = from.kind == 'f' || from.kind == 'h';
    if (from_real && !to_real && mode.empty()) d.refuse();
    if (saturate && !(from_real && to_real)) d.refuse();
    out.number = code_of(d, to) | code_of(d, from) << 8;
    out.detail = static_cast<std::uint8_t>((mode.empty() ? 0 : mode[1]) | (saturate ? 128 : 0));
    out.run = &convert;
}

// detail: 0 between global and generic, which are the same; 1 to the window, 2 from it.
Flow change_address(Warp& w, const Instruction& i, std::uint32_t lanes) {
    const std::uint64_t window = i.space == Space::kShared  ? kSharedWindow
                                 : i.space == Space::kLocal ? kLocalWindow
                                 : i.space == Space::kParam ? kParamWindow
                                                            : 0;
    std::uint64_t* out = w.row(i.rows[0]);
    const std::uint64_t* in = w.row(i.rows[1]);
    for_lanes(lanes, [&](unsigned l) {
        out[l] = i.detail == 1 ? in[l] + window : i.detail == 2 ? in[l] - window : in[l];
    });
    return Flow::kNext;
}

void address_conversion(Decoding& d, Instruction& out) {
    const bool from_generic = d.take("to");
    const std::string space =
        d.take_any({"global", "shared", "shared::cta", "local", "param", "const"});
    if (space.empty() || d.take_type().bits != 64) d.refuse();
    plain_operands(d, out);
    require_operands(d, 2);
    out.space = space.starts_with("shared") ? Space::kShared
                : space == "local"          ? Space::kLocal
                : space == "param"          ? Space::kParam
                                            : Space::kGlobal;
    out.detail = out.space == Space::kGlobal ? 0 : from_generic ? 2 : 1;
    out.run = &change_address;
}

}  // namespace

bool decode_conversion(std::string_view opcode, Decoding& d, Instruction& out) {
    if (opcode == "cvt")
        conversion(d, out);
    else if (opcode == "cvta")
        address_conversion(d, out);
    else
        return false;
    return true;
}

}  // namespace emulator::ptx
