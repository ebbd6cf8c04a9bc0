// Logic, shifts and bit fields.
#include <algorithm>
#include <bit>

#include "ptx_operations.hpp"

namespace emulator::ptx {
namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;

template <class Op>
void binary_of_bits(Decoding& d, Instruction& out) {
    const Type type = d.take_type();
    plain_operands(d, out);
    require_operands(d, 3);
    out.run = type.kind == 'p'
                  ? &binary<std::uint8_t, Op>
                  : with_integer(d, type, []<class T>() -> Handler { return &binary<T, Op>; });
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

struct FunnelLeft {  // of high:low = c:b; the shift is clamped or wrapped by the caller
    static std::uint32_t of(std::uint64_t both, unsigned by) {
        return static_cast<std::uint32_t>((by >= 32 ? both << 32 : both << by) >> 32);
    }
};

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

// The place of the highest bit, or how far a shift to the left brings it there; of 0, all ones.
template <class T, bool kShift>
Flow find_bit(Warp& w, const Instruction& i, std::uint32_t lanes) {
    std::uint64_t* to = w.row(i.rows[0]);
    const std::uint64_t* a = w.row(i.rows[1]);
    for_lanes(lanes, [&](unsigned l) {
        const T value = get<T>(a[l]);
        const auto zeros = static_cast<unsigned>(std::countl_zero(value));
        to[l] = value == 0 ? 0xffffffffu : kShift ? zeros : 8 * sizeof(T) - 1 - zeros;
    });
    return Flow::kNext;
}

void finding(Decoding& d, Instruction& out) {
    const bool shift = d.take("shiftamt");
    const Type type = d.take_type();
    if (type.kind != 'u') d.refuse();  // of signed numbers: the highest bit that is not the sign's
    plain_operands(d, out);
    require_operands(d, 2);
    if (type.bits == 32)
        out.run = shift ? &find_bit<std::uint32_t, true> : &find_bit<std::uint32_t, false>;
    else
        out.run = shift ? &find_bit<std::uint64_t, true> : &find_bit<std::uint64_t, false>;
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

bool decode_bits(std::string_view opcode, Decoding& d, Instruction& out) {
    if (opcode == "and")
        binary_of_bits<And>(d, out);
    else if (opcode == "or")
        binary_of_bits<Or>(d, out);
    else if (opcode == "xor")
        binary_of_bits<Xor>(d, out);
    else if (opcode == "not")
        complement(d, out);
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
    else if (opcode == "bfind")
        finding(d, out);
    else if (opcode == "lop3") {
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
