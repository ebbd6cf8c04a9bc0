// mma.sync, ldmatrix and stmatrix.
//
// Products of 16-bit floats are exact in float32; they are summed in float64 and rounded once,
// which is not what tensor cores do bit for bit (they truncate), but is within their error.
#include <algorithm>
#include <array>
#include <cstring>

#include "emulator.hpp"
#include "ptx_values.hpp"
#include "report.hpp"

namespace emulator::ptx {
namespace {

const std::array<float, 65536>& half_table() {
    static const auto table = [] {
        std::array<float, 65536> all;
        for (unsigned i = 0; i < all.size(); ++i) {
            all[i] = fastllm::to_float(float16{static_cast<std::uint16_t>(i)});
        }
        return all;
    }();
    return table;
}

template <class H>
float half_value(std::uint64_t packed, unsigned which) {
    const auto bits = static_cast<std::uint16_t>(packed >> (16 * which));
    if constexpr (std::is_same_v<H, float16>)
        return half_table()[bits];
    else
        return fastllm::to_float(H{bits});
}

// Whether all lanes are here; others may be on their way.
Flow whole_warp(Warp& w, const Instruction& i, std::uint32_t lanes) {
    if (lanes == kAllLanes) return Flow::kNext;
    if (w.alive() != kAllLanes) {
        w.block->about(w, static_cast<unsigned>(__builtin_ctz(lanes)));
        report("warp-mask", "%s at line %d with lanes %08x alone", i.text->c_str(), i.line,
               w.alive());
        throw Abandoned{};
    }
    return Flow::kWait;
}

// D = A B + C, m16n8 by k. Which lane holds what: PTX ISA, "Matrix Fragments for mma.m16n8k16"
// (.f16 and .bf16). rows: 4 of D, k / 4 of A, k / 8 of B, 4 of C.
template <class H, unsigned kDepth>
Flow multiply(Warp& w, const Instruction& i, std::uint32_t lanes) {
    if (whole_warp(w, i, lanes) == Flow::kWait) return Flow::kWait;
    constexpr unsigned kA = kDepth / 4;
    constexpr unsigned kB = kDepth / 8;
    float a[16][kDepth];
    float b[kDepth][8];
    for (unsigned l = 0; l < 32; ++l) {
        const unsigned group = l / 4;
        const unsigned k = l % 4 * 2;
        for (unsigned r = 0; r < kA; ++r) {
            const std::uint64_t packed = w.row(i.rows[4 + r])[l];
            for (unsigned h = 0; h < 2; ++h) {
                a[group + r % 2 * 8][k + h + r / 2 * 8] = half_value<H>(packed, h);
            }
        }
        for (unsigned r = 0; r < kB; ++r) {
            const std::uint64_t packed = w.row(i.rows[4 + kA + r])[l];
            for (unsigned h = 0; h < 2; ++h) b[k + h + r * 8][group] = half_value<H>(packed, h);
        }
    }
    double sum[16][8];
    for (unsigned m = 0; m < 16; ++m) {
        std::fill_n(sum[m], 8, 0.0);
        for (unsigned k = 0; k < kDepth; ++k) {
            for (unsigned n = 0; n < 8; ++n) {
                sum[m][n] += static_cast<double>(a[m][k]) * static_cast<double>(b[k][n]);
            }
        }
    }
    for (unsigned r = 0; r < 4; ++r) {
        const std::uint64_t* c = w.row(i.rows[4 + kA + kB + r]);
        std::uint64_t* d = w.row(i.rows[r]);
        for (unsigned l = 0; l < 32; ++l) {
            const double product = sum[l / 4 + r / 2 * 8][l % 4 * 2 + r % 2];
            d[l] = bits_of(static_cast<float>(product + static_cast<double>(get<float>(c[l]))));
        }
    }
    return Flow::kNext;
}

std::size_t vector_rows(Decoding& d, const std::string& operand, bool destination, Instruction& out,
                        std::size_t at) {
    if (operand.front() != '{') d.refuse();
    for (const std::string& part :
         split_operands(std::string_view(operand).substr(1, operand.size() - 2))) {
        if (at == out.rows.size()) d.refuse();
        out.rows[at++] = destination ? d.destination(part) : d.source(part);
    }
    return at;
}

void matrix_multiply(Decoding& d, Instruction& out) {
    if (!d.take("sync")) d.refuse();
    d.take("aligned");
    const bool deep = d.take("m16n8k16");
    if (!deep && !d.take("m16n8k8")) d.refuse();
    if (!d.take("row") || !d.take("col")) d.refuse();
    const Type types[4] = {d.take_type(), d.take_type(), d.take_type(), d.take_type()};
    const Type single{'f', 32, false};
    if (!(types[0] == single) || !(types[3] == single) || !(types[1] == types[2])) d.refuse();
    const bool bfloat = types[1] == Type{'h', 16, false};
    if (!bfloat && !(types[1] == Type{'f', 16, false})) d.refuse();
    require_operands(d, 4);
    std::size_t at = 0;
    for (std::size_t n = 0; n < 4; ++n) at = vector_rows(d, d.operand(n), n == 0, out, at);
    if (at != (deep ? 14 : 11)) d.refuse();
    out.run = deep ? (bfloat ? &multiply<bfloat16, 16> : &multiply<float16, 16>)
                   : (bfloat ? &multiply<bfloat16, 8> : &multiply<float16, 8>);
}

// rows: the destinations, one per 8x8 matrix, then the address. detail 1: transposed.
Flow load_matrix(Warp& w, const Instruction& i, std::uint32_t lanes) {
    if (whole_warp(w, i, lanes) == Flow::kWait) return Flow::kWait;
    const std::uint64_t* base = w.row(i.rows[i.elements]);
    const unsigned givers = 8u * i.elements;  // lanes whose address counts, one row each
    std::uint64_t addresses[32];
    std::uint16_t rows[32][8];
    for (unsigned l = 0; l < givers; ++l) {
        addresses[l] = base[l] + static_cast<std::uint64_t>(i.offset);
        std::memcpy(rows[l],
                    w.block->reach(w, l, Space::kShared, addresses[l], 16, Access::kRead, i.line),
                    16);
    }
    w.block->count(Space::kShared, addresses, givers == 32 ? kAllLanes : (1u << givers) - 1, 16);
    for (unsigned m = 0; m < i.elements; ++m) {
        std::uint64_t* to = w.row(i.rows[m]);
        for (unsigned l = 0; l < 32; ++l) {
            const unsigned one = l / 4;
            const unsigned two = l % 4 * 2;
            const auto at = [&](unsigned h) -> std::uint64_t {
                return i.detail != 0 ? rows[m * 8 + two + h][one] : rows[m * 8 + one][two + h];
            };
            to[l] = at(0) | at(1) << 16;
        }
    }
    return Flow::kNext;
}

void matrix_load(Decoding& d, Instruction& out) {
    if (!d.take("sync")) d.refuse();
    d.take("aligned");
    if (!d.take("m8n8")) d.refuse();
    const std::string count = d.take_any({"x1", "x2", "x4"});
    out.detail = d.take("trans");
    if (count.empty() || d.take_any({"shared", "shared::cta"}).empty() ||
        !(d.take_type() == Type{'b', 16, false})) {
        d.refuse();
    }
    require_operands(d, 2);
    out.elements = static_cast<std::uint8_t>(count[1] - '0');
    if (vector_rows(d, d.operand(0), true, out, 0) != out.elements) d.refuse();
    d.address(d.operand(1), out, out.elements);
    out.run = &load_matrix;
}

// rows: the address, then the sources, one per 8x8 matrix. detail 1: transposed.
Flow store_matrix(Warp& w, const Instruction& i, std::uint32_t lanes) {
    if (whole_warp(w, i, lanes) == Flow::kWait) return Flow::kWait;
    const std::uint64_t* base = w.row(i.rows[0]);
    const unsigned takers = 8u * i.elements;  // lanes whose address counts, one row each
    std::uint64_t addresses[32];
    for (unsigned l = 0; l < takers; ++l) {
        addresses[l] = base[l] + static_cast<std::uint64_t>(i.offset);
        std::uint16_t row[8];
        for (unsigned c = 0; c < 8; ++c) {
            const unsigned r = l % 8;
            const unsigned lane = i.detail != 0 ? c * 4 + r / 2 : r * 4 + c / 2;
            const unsigned half = i.detail != 0 ? r % 2 : c % 2;
            row[c] = static_cast<std::uint16_t>(w.row(i.rows[1 + l / 8])[lane] >> (16 * half));
        }
        std::memcpy(w.block->reach(w, l, Space::kShared, addresses[l], 16, Access::kWrite, i.line),
                    row, 16);
    }
    w.block->count(Space::kShared, addresses, takers == 32 ? kAllLanes : (1u << takers) - 1, 16);
    return Flow::kNext;
}

void matrix_store(Decoding& d, Instruction& out) {
    if (!d.take("sync")) d.refuse();
    d.take("aligned");
    if (!d.take("m8n8")) d.refuse();
    const std::string count = d.take_any({"x1", "x2", "x4"});
    out.detail = d.take("trans");
    if (count.empty() || d.take_any({"shared", "shared::cta"}).empty() ||
        !(d.take_type() == Type{'b', 16, false})) {
        d.refuse();
    }
    require_operands(d, 2);
    out.elements = static_cast<std::uint8_t>(count[1] - '0');
    d.address(d.operand(0), out, 0);
    if (vector_rows(d, d.operand(1), false, out, 1) != out.elements + 1u) d.refuse();
    out.run = &store_matrix;
}

}  // namespace

bool decode_matrix(std::string_view opcode, Decoding& d, Instruction& out) {
    if (opcode == "mma")
        matrix_multiply(d, out);
    else if (opcode == "ldmatrix")
        matrix_load(d, out);
    else if (opcode == "stmatrix")
        matrix_store(d, out);
    else
        return false;
    return true;
}

}  // namespace emulator::ptx
