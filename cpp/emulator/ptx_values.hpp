// Values in rows: registers hold 64 bits, and instructions see the low ones as their type.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "fastllm/dtype.hpp"
#include "ptx_machine.hpp"

namespace emulator::ptx {

using fastllm::bfloat16;
using fastllm::float16;

struct half2 {
    float16 low, high;
};
struct bfloat162 {
    bfloat16 low, high;
};

template <std::size_t kBytes>
using Bits = std::conditional_t<
    kBytes == 1, std::uint8_t,
    std::conditional_t<kBytes == 2, std::uint16_t,
                       std::conditional_t<kBytes == 4, std::uint32_t, std::uint64_t>>>;

template <class T>
inline T get(std::uint64_t value) {
    return std::bit_cast<T>(static_cast<Bits<sizeof(T)>>(value));
}

// Signed integers are extended, so that a wider register holds the same number.
template <class T>
inline std::uint64_t bits_of(T value) {
    if constexpr (std::is_integral_v<T> && std::is_signed_v<T>) {
        return static_cast<std::uint64_t>(static_cast<std::int64_t>(value));
    } else {
        return std::bit_cast<Bits<sizeof(T)>>(value);
    }
}

// f.template operator()<T>() for the C++ type of an integer or bit type.
template <class F>
auto with_integer(Decoding& d, const Type& type, const F& f) {
    const bool is_signed = type.kind == 's';
    if (type.pair || (type.kind != 'b' && type.kind != 'u' && !is_signed)) d.refuse();
    switch (type.bits) {
        case 8:
            return is_signed ? f.template operator()<std::int8_t>()
                             : f.template operator()<std::uint8_t>();
        case 16:
            return is_signed ? f.template operator()<std::int16_t>()
                             : f.template operator()<std::uint16_t>();
        case 32:
            return is_signed ? f.template operator()<std::int32_t>()
                             : f.template operator()<std::uint32_t>();
        case 64:
            return is_signed ? f.template operator()<std::int64_t>()
                             : f.template operator()<std::uint64_t>();
        default:
            d.refuse();
    }
}

template <class T, class Op>
Flow unary(Warp& w, const Instruction& i, std::uint32_t lanes) {
    std::uint64_t* to = w.row(i.rows[0]);
    const std::uint64_t* a = w.row(i.rows[1]);
    for_lanes(lanes, [&](unsigned l) { to[l] = bits_of<T>(Op{}(get<T>(a[l]))); });
    return Flow::kNext;
}

template <class T, class Op>
Flow binary(Warp& w, const Instruction& i, std::uint32_t lanes) {
    std::uint64_t* to = w.row(i.rows[0]);
    const std::uint64_t* a = w.row(i.rows[1]);
    const std::uint64_t* b = w.row(i.rows[2]);
    for_lanes(lanes, [&](unsigned l) { to[l] = bits_of<T>(Op{}(get<T>(a[l]), get<T>(b[l]))); });
    return Flow::kNext;
}

template <class T, class Op>
Flow ternary(Warp& w, const Instruction& i, std::uint32_t lanes) {
    std::uint64_t* to = w.row(i.rows[0]);
    const std::uint64_t* a = w.row(i.rows[1]);
    const std::uint64_t* b = w.row(i.rows[2]);
    const std::uint64_t* c = w.row(i.rows[3]);
    for_lanes(lanes, [&](unsigned l) {
        to[l] = bits_of<T>(Op{}(get<T>(a[l]), get<T>(b[l]), get<T>(c[l])));
    });
    return Flow::kNext;
}

// rows[0] = the destination, rows[1..] = the sources, all plain registers or constants.
inline void plain_operands(Decoding& d, Instruction& out) {
    out.rows[0] = d.destination(d.operand(0));
    for (std::size_t i = 1; i < d.operand_count(); ++i) out.rows[i] = d.source(d.operand(i));
}

inline void require_operands(Decoding& d, std::size_t count) {
    if (d.operand_count() != count) d.refuse();
}

}  // namespace emulator::ptx
