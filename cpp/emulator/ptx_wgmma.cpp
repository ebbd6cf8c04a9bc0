// wgmma: products of a warpgroup from shared memory, beside its warps.
//
// A product is computed where it is issued, but until wgmma.wait_group its reads of shared memory
// belong to the warpgroup's asynchronous agent and its accumulators are nobody's to touch. Products
// of 16-bit floats are summed in float64 and rounded once.
#include <algorithm>
#include <cstring>
#include <vector>

#include "block.hpp"
#include "emulator.hpp"
#include "ptx_tensor_map.hpp"
#include "ptx_values.hpp"
#include "report.hpp"

namespace emulator::ptx {
namespace {

constexpr unsigned kDepth = 16;  // of 16-bit floats
constexpr unsigned kRows = 16;   // of each warp

[[noreturn]] void refuse_operation(Warp& w, const Instruction& i, const char* why) {
    w.block->about(w, 0);
    report("wgmma", "at line %d: %s", i.line, why);
    throw Abandoned{};
}

void require_warp(Warp& w, const Instruction& i, std::uint32_t lanes) {
    if (lanes != kAllLanes) refuse_operation(w, i, "not all lanes of the warp are here");
    if ((w.index | 3) >= w.block->warp_count()) {
        refuse_operation(w, i, "the warpgroup has not four warps");
    }
}

// A matrix descriptor (PTX ISA, "Matrix Descriptor Format") of a swizzled operand: lines of as many
// bytes as the swizzle, in groups of eight. A line is along k, or along m or n if `transposed`.
struct Operand {
    std::uint32_t start;
    std::uint32_t leading;      // transposed: bytes from one line's end to where m or n goes on
    std::uint32_t eight_lines;  // bytes from one group of eight to the next
    unsigned swizzle;
    bool transposed;
};

Operand operand(Warp& w, const Instruction& i, std::uint64_t descriptor, bool transposed) {
    constexpr unsigned kSwizzle[] = {0, 128, 64, 32};
    const Operand o{static_cast<std::uint32_t>(descriptor & 0x3fff) << 4,
                    static_cast<std::uint32_t>(descriptor >> 16 & 0x3fff) << 4,
                    static_cast<std::uint32_t>(descriptor >> 32 & 0x3fff) << 4,
                    kSwizzle[descriptor >> 62], transposed};
    if (o.swizzle == 0 || (descriptor >> 49 & 7) != 0) {
        refuse_operation(w, i, "not emulated: an operand without swizzle or with a base offset");
    }
    return o;
}

// Where the eight elements are that begin at (`row`, `k`) and go along the line.
std::uint32_t eight_at(const Operand& o, unsigned row, unsigned k) {
    const unsigned line = o.transposed ? k : row;
    const unsigned along = (o.transposed ? row : k) * 2;  // bytes
    return o.start + line / 8 * o.eight_lines + line % 8 * o.swizzle +
           along / o.swizzle * o.leading + along % o.swizzle;
}

// `rows` rows of the operand from `first` on, 16 elements each: to[row * 16 + k].
template <class H>
void read_rows(Warp& w, const Instruction& i, const Operand& o, unsigned first, unsigned rows,
               std::vector<double>& to) {
    const unsigned row_step = o.transposed ? 8 : 1;
    const unsigned k_step = o.transposed ? 1 : 8;
    std::uint16_t bits[8];
    for (unsigned row = 0; row < rows; row += row_step) {
        for (unsigned k = 0; k < kDepth; k += k_step) {
            const std::uint32_t at = swizzled(eight_at(o, first + row, k), o.swizzle);
            std::memcpy(bits,
                        w.block->reach_async(w, row % 32, Space::kShared, at, 16, Access::kRead,
                                             i.line, w.block->agent_of_wgmma(w)),
                        16);
            for (unsigned e = 0; e < 8; ++e) {
                const unsigned place = (row + (o.transposed ? e : 0)) * kDepth + k;
                to[place + (o.transposed ? 0 : e)] =
                    static_cast<double>(fastllm::to_float(H{bits[e]}));
            }
        }
    }
}

// The accumulators must not have been written since the last operation without a wgmma.fence.
void require_fence(Warp& w, const Instruction& i) {
    WgmmaState& state = w.wgmma;
    if (state.fenced || state.operations != 0) return;
    const auto untouched = [&](Row row) {
        for (const auto& [left, values] : state.left) {
            if (left == row) return std::equal(values.begin(), values.end(), w.row(row));
        }
        return false;
    };
    if (std::all_of(i.accumulators.begin(), i.accumulators.end(), untouched)) return;
    w.block->about(w, 0);
    report("wgmma", "accumulators at line %d without a wgmma.fence after others wrote them",
           i.line);
    state.fenced = true;  // once
}

// D (64, n) = A (64, 16) B (16, n) + D or + 0; A and B by descriptor, B as n rows of 16. Which
// lane holds what of D: PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16".
// rows: descriptors of A and B, the predicate to add D; detail: A and B are negated; number: bits 0
// and 1 for a transposed A and B.
template <class H>
Flow multiply(Warp& w, const Instruction& i, std::uint32_t lanes) {
    require_warp(w, i, lanes);
    require_fence(w, i);
    const auto columns = static_cast<unsigned>(i.accumulators.size()) * 2;
    const Operand a = operand(w, i, w.row(i.rows[0])[0], (i.number & 1) != 0);
    const Operand b = operand(w, i, w.row(i.rows[1])[0], (i.number & 2) != 0);
    std::vector<double> left(kRows * kDepth);
    std::vector<double> right(columns * kDepth);
    read_rows<H>(w, i, a, w.index % 4 * kRows, kRows, left);
    read_rows<H>(w, i, b, 0, columns, right);
    const double sign = i.detail == 1 || i.detail == 2 ? -1.0 : 1.0;
    const bool add = w.row(i.rows[2])[0] != 0;
    for (unsigned r = 0; r < i.accumulators.size(); ++r) {
        std::uint64_t* d = w.row(i.accumulators[r]);
        for (unsigned l = 0; l < 32; ++l) {
            const double* x = &left[(l / 4 + r / 2 % 2 * 8) * kDepth];
            const double* y = &right[(r / 4 * 8 + l % 4 * 2 + r % 2) * kDepth];
            double sum = 0.0;
            for (unsigned k = 0; k < kDepth; ++k) sum += x[k] * y[k];
            const double before = add ? static_cast<double>(get<float>(d[l])) : 0.0;
            d[l] = bits_of(static_cast<float>(before + sign * sum));
        }
    }
    WgmmaState& state = w.wgmma;
    for (const Row row : i.accumulators) ++state.in_use[row];
    state.open.insert(state.open.end(), i.accumulators.begin(), i.accumulators.end());
    state.operations = static_cast<unsigned>(state.groups.size()) + 1;
    return Flow::kNext;
}

Flow fence(Warp& w, const Instruction& i, std::uint32_t lanes) {
    require_warp(w, i, lanes);
    w.wgmma.fenced = true;
    return Flow::kNext;
}

Flow commit(Warp& w, const Instruction& i, std::uint32_t lanes) {
    require_warp(w, i, lanes);
    return w.block->commit_wgmma(w, i.line);
}

// number: groups that may remain.
Flow wait(Warp& w, const Instruction& i, std::uint32_t lanes) {
    require_warp(w, i, lanes);
    WgmmaState& state = w.wgmma;
    if (state.groups.size() <= i.number) return Flow::kNext;
    const std::uint64_t groups = state.committed - i.number;
    Time when = kNever;
    if (!w.block->wgmma_complete(w, groups, when)) return Flow::kWait;
    state.left.clear();
    while (state.groups.size() > i.number) {
        for (const Row row : state.groups.front()) {
            --state.in_use[row];
            if (state.in_use[row] != 0) continue;
            auto& left = state.left.emplace_back();
            left.first = row;
            std::copy_n(w.row(row), 32, left.second.begin());
        }
        state.groups.pop_front();
    }
    state.operations = static_cast<unsigned>(state.groups.size()) + !state.open.empty();
    state.fenced = false;
    Knowledge knowledge;
    knowledge.done.learn(w.block->agent_of_wgmma(w), when);
    w.block->acquire(w, kAllLanes, knowledge);
    return Flow::kNext;
}

void multiplication(Decoding& d, Instruction& out) {
    unsigned columns = 0;
    for (unsigned n = 8; n <= 256 && columns == 0; n += 8) {
        if (d.take("m64n" + std::to_string(n) + "k16")) columns = n;
    }
    if (columns == 0) d.refuse();
    const Type types[3] = {d.take_type(), d.take_type(), d.take_type()};
    if (!(types[0] == Type{'f', 32, false}) || !(types[1] == types[2])) d.refuse();
    require_operands(d, 8);
    const std::string& accumulators = d.operand(0);
    if (accumulators.front() != '{' || d.operand(1).front() == '{') d.refuse();
    for (const std::string& name :
         split_operands(std::string_view(accumulators).substr(1, accumulators.size() - 2))) {
        out.accumulators.push_back(d.destination(name));
    }
    if (out.accumulators.size() * 2 != columns) d.refuse();
    out.rows[0] = d.source(d.operand(1));
    out.rows[1] = d.source(d.operand(2));
    out.rows[2] = d.source(d.operand(3));
    for (std::size_t n = 4; n < 6; ++n) {
        const std::int64_t sign = d.integer(d.operand(n));
        if (sign == -1)
            ++out.detail;
        else if (sign != 1)
            d.refuse();
    }
    if (out.detail == 2) out.detail = 0;  // both
    for (std::size_t n = 6; n < 8; ++n) {
        const std::int64_t transposed = d.integer(d.operand(n));
        if (transposed != 0 && transposed != 1) d.refuse();
        out.number |= static_cast<std::uint32_t>(transposed) << (n - 6);
    }
    if (types[1] == Type{'h', 16, false})
        out.run = &multiply<bfloat16>;
    else if (types[1] == Type{'f', 16, false})
        out.run = &multiply<float16>;
    else
        d.refuse();
}

}  // namespace

Flow Block::commit_wgmma(Warp& warp, int line) {
    WgmmaState& state = warp.wgmma;
    if (state.passed_commit) {
        state.passed_commit = state.at_commit = false;
        return Flow::kNext;
    }
    if (state.at_commit) return Flow::kWait;
    state.at_commit = true;
    state.groups.push_back(std::move(state.open));
    state.open.clear();
    ++state.committed;
    failed_polls_ = 0;
    // An operation is the whole warpgroup's: it is under way when all four warps have issued it.
    const unsigned first = warp.index / 4 * 4;
    Warpgroup& group = warpgroups_[warp.index / 4];
    group.arrived |= 1u << warp.index % 4;
    if (group.arrived != 15) return Flow::kWait;
    group.arrived = 0;
    group.groups.push_back(advance_time());
    for (unsigned w = first; w < first + 4; ++w) {
        if (warps_[w].wgmma.committed != state.committed) {
            about(warp, 0);
            report("wgmma", "warps of a warpgroup commit different groups at line %d", line);
            throw Abandoned{};
        }
        warps_[w].wgmma.passed_commit = true;
    }
    wake();
    state.passed_commit = state.at_commit = false;
    return Flow::kNext;
}

bool Block::wgmma_complete(const Warp& warp, std::uint64_t groups, Time& when) const {
    const Warpgroup& group = warpgroups_[warp.index / 4];
    if (group.groups.size() < groups) return false;
    when = group.groups[groups - 1];
    return true;
}

// A register that an operation still adds to is nobody's to touch.
void Block::check_accumulators(Warp& warp, const Instruction& instruction, std::uint32_t lanes) {
    if (lanes == 0 || !instruction.accumulators.empty()) return;
    for (const Row row : instruction.rows) {
        if (row == kNoRow || warp.wgmma.in_use[row] == 0) continue;
        about(warp, static_cast<unsigned>(__builtin_ctz(lanes)));
        report("wgmma", "%s at line %d touches an accumulator before wgmma.wait_group",
               instruction.text->c_str(), instruction.line);
        return;
    }
}

bool decode_wgmma(std::string_view opcode, Decoding& d, Instruction& out) {
    if (opcode != "wgmma") return false;
    const std::string what = d.take_any({"fence", "mma_async", "commit_group", "wait_group"});
    if (what.empty() || !d.take("sync") || !d.take("aligned")) d.refuse();
    if (what == "mma_async") {
        multiplication(d, out);
    } else if (what == "wait_group") {
        require_operands(d, 1);
        out.number = static_cast<std::uint32_t>(d.integer(d.operand(0)));
        out.run = &wait;
    } else {
        out.run = what == "fence" ? &fence : &commit;
    }
    return true;
}

}  // namespace emulator::ptx
