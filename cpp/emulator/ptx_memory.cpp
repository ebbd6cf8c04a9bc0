// ld, st, atom, red, cp.async, fences and hints.
#include <algorithm>
#include <cstring>

#include "ptx_values.hpp"
#include "report.hpp"

namespace emulator::ptx {
namespace {

// rows: the elements, then the address.
template <class T>
Flow load(Warp& w, const Instruction& i, std::uint32_t lanes) {
    const std::uint64_t* base = w.row(i.rows[i.elements]);
    std::uint64_t addresses[32];
    const std::size_t bytes = sizeof(T) * i.elements;
    std::uint64_t values[8][32];
    for_lanes(lanes, [&](unsigned l) {
        addresses[l] = base[l] + static_cast<std::uint64_t>(i.offset);
        unsigned char* p =
            w.block->reach(w, l, i.space, addresses[l], bytes, Access::kRead, i.line);
        for (unsigned n = 0; n < i.elements; ++n) {
            T value;
            std::memcpy(&value, p + n * sizeof(T), sizeof(T));
            values[n][l] = bits_of(value);
        }
    });
    w.block->count(i.space, addresses, lanes, bytes);
    // After all lanes have read: a destination may be the address.
    for (unsigned n = 0; n < i.elements; ++n) {
        if (i.rows[n] == kNoRow) continue;
        std::uint64_t* to = w.row(i.rows[n]);
        for_lanes(lanes, [&](unsigned l) { to[l] = values[n][l]; });
    }
    return Flow::kNext;
}

// rows: the address, then the elements.
Flow store(Warp& w, const Instruction& i, std::uint32_t lanes) {
    const std::uint64_t* base = w.row(i.rows[0]);
    std::uint64_t addresses[32];
    const std::size_t bytes = std::size_t{i.bytes} * i.elements;
    for_lanes(lanes, [&](unsigned l) {
        addresses[l] = base[l] + static_cast<std::uint64_t>(i.offset);
        unsigned char* p =
            w.block->reach(w, l, i.space, addresses[l], bytes, Access::kWrite, i.line);
        for (unsigned n = 0; n < i.elements; ++n) {
            std::memcpy(p + n * i.bytes, &w.row(i.rows[1 + n])[l], i.bytes);  // little endian
        }
    });
    w.block->count(i.space, addresses, lanes, bytes);
    return Flow::kNext;
}

Space take_space(Decoding& d) {
    const std::string space =
        d.take_any({"global", "shared", "shared::cta", "local", "param", "const"});
    return space.empty()                           ? Space::kGeneric
           : space == "global" || space == "const" ? Space::kGlobal
           : space == "local"                      ? Space::kLocal
           : space == "param"                      ? Space::kParam
                                                   : Space::kShared;
}

// Qualifiers that change neither the value nor what the checker concludes.
void take_hints(Decoding& d) {
    while (!d.take_any({"nc",
                        "volatile",
                        "weak",
                        "relaxed",
                        "acquire",
                        "release",
                        "gpu",
                        "cta",
                        "sys",
                        "ca",
                        "cg",
                        "cs",
                        "cv",
                        "lu",
                        "wb",
                        "wt",
                        "L1::no_allocate",
                        "L1::evict_last",
                        "L1::evict_first",
                        "L2::128B",
                        "L2::256B",
                        "L2::64B"})
                .empty()) {
    }
}

unsigned take_elements(Decoding& d) {
    const std::string vector = d.take_any({"v2", "v4", "v8"});
    return vector.empty() ? 1 : static_cast<unsigned>(vector[1] - '0');
}

std::vector<std::string> elements_of(Decoding& d, const std::string& operand, unsigned count) {
    if (count == 1) return {operand};
    if (operand.front() != '{') d.refuse();
    std::vector<std::string> parts =
        split_operands(std::string_view(operand).substr(1, operand.size() - 2));
    if (parts.size() != count) d.refuse();
    return parts;
}

Type memory_type(Decoding& d) {
    Type type = d.take_type();
    if (type.kind == 'p' || type.bits > 64) d.refuse();
    if (type.kind == 'f' || type.kind == 'h' || type.pair) type = {'b', type.bytes() * 8, false};
    return type;
}

void loading(Decoding& d, Instruction& out) {
    take_hints(d);
    out.space = take_space(d);
    take_hints(d);
    const unsigned elements = take_elements(d);
    const Type type = memory_type(d);
    require_operands(d, 2);
    out.elements = static_cast<std::uint8_t>(elements);
    const auto parts = elements_of(d, d.operand(0), elements);
    for (unsigned n = 0; n < elements; ++n) {
        out.rows[n] = parts[n] == "_" ? kNoRow : d.destination(parts[n]);
    }
    d.address(d.operand(1), out, elements);
    out.run = with_integer(d, type, []<class T>() -> Handler { return &load<T>; });
}

void storing(Decoding& d, Instruction& out) {
    take_hints(d);
    out.space = take_space(d);
    take_hints(d);
    const unsigned elements = take_elements(d);
    const Type type = memory_type(d);
    require_operands(d, 2);
    if (out.space == Space::kParam) d.refuse();
    out.elements = static_cast<std::uint8_t>(elements);
    out.bytes = static_cast<std::uint8_t>(type.bytes());
    d.address(d.operand(0), out, 0);
    const auto parts = elements_of(d, d.operand(1), elements);
    for (unsigned n = 0; n < elements; ++n) out.rows[1 + n] = d.source(parts[n]);
    out.run = &store;
}

// --- atomic operations ---------------------------------------------------------------------------

enum class Atomic : std::uint8_t { kAdd, kMin, kMax, kAnd, kOr, kXor, kExchange, kCompareSwap };
constexpr std::pair<std::string_view, Atomic> kAtomics[] = {
    {"add", Atomic::kAdd},       {"min", Atomic::kMin},        {"max", Atomic::kMax},
    {"and", Atomic::kAnd},       {"or", Atomic::kOr},          {"xor", Atomic::kXor},
    {"exch", Atomic::kExchange}, {"cas", Atomic::kCompareSwap}};

template <class T>
T updated(Atomic what, T old, T a, T b) {
    if constexpr (!std::is_floating_point_v<T>) {
        if (what == Atomic::kAnd) return static_cast<T>(old & a);
        if (what == Atomic::kOr) return static_cast<T>(old | a);
        if (what == Atomic::kXor) return static_cast<T>(old ^ a);
        if (what == Atomic::kAdd) {
            return static_cast<T>(static_cast<std::uint64_t>(old) + static_cast<std::uint64_t>(a));
        }
    }
    switch (what) {
        case Atomic::kAdd:
            return static_cast<T>(old + a);
        case Atomic::kMin:
            return std::min(old, a);
        case Atomic::kMax:
            return std::max(old, a);
        case Atomic::kCompareSwap:
            return old == a ? b : old;
        default:
            return a;
    }
}

// rows: destination or none, address, a, b.
template <class T>
Flow atomic(Warp& w, const Instruction& i, std::uint32_t lanes) {
    for_lanes(lanes, [&](unsigned l) {
        const std::uint64_t address = w.row(i.rows[1])[l] + static_cast<std::uint64_t>(i.offset);
        unsigned char* p =
            w.block->reach(w, l, i.space, address, sizeof(T), Access::kAtomic, i.line);
        T old;
        std::memcpy(&old, p, sizeof(T));
        const T b = i.rows[3] == kNoRow ? T{} : get<T>(w.row(i.rows[3])[l]);
        const T next =
            updated<T>(static_cast<Atomic>(i.detail), old, get<T>(w.row(i.rows[2])[l]), b);
        std::memcpy(p, &next, sizeof(T));
        if (i.rows[0] != kNoRow) w.row(i.rows[0])[l] = bits_of(old);
    });
    return Flow::kNext;
}

void atomic_operation(Decoding& d, Instruction& out, bool returns) {
    take_hints(d);
    out.space = take_space(d);
    take_hints(d);
    bool found = false;
    for (const auto& [name, what] : kAtomics) {
        if (found || !d.take(name)) continue;
        out.detail = static_cast<std::uint8_t>(what);
        found = true;
    }
    if (!found) d.refuse();
    const Type type = d.take_type();
    const std::size_t first = returns ? 1 : 0;
    const bool swap = static_cast<Atomic>(out.detail) == Atomic::kCompareSwap;
    require_operands(d, first + (swap ? 3 : 2));
    out.rows[0] = returns && d.operand(0) != "_" ? d.destination(d.operand(0)) : kNoRow;
    d.address(d.operand(first), out, 1);
    out.rows[2] = d.source(d.operand(first + 1));
    out.rows[3] = swap ? d.source(d.operand(first + 2)) : kNoRow;
    if (type == Type{'f', 32, false})
        out.run = &atomic<float>;
    else if (type == Type{'f', 64, false})
        out.run = &atomic<double>;
    else
        out.run = with_integer(d, type, []<class T>() -> Handler { return &atomic<T>; });
}

// --- cp.async ------------------------------------------------------------------------------------

// rows: shared address, global address, bytes to read or none; bytes: of the copy.
Flow copy_async(Warp& w, const Instruction& i, std::uint32_t lanes) {
    std::uint64_t from[32];
    for_lanes(lanes, [&](unsigned l) {
        from[l] = w.row(i.rows[1])[l] + static_cast<std::uint64_t>(i.offset);
        std::uint64_t read = i.bytes;
        if (i.rows[2] != kNoRow) {
            read = std::min<std::uint64_t>(read, static_cast<std::uint32_t>(w.row(i.rows[2])[l]));
        }
        const auto to = static_cast<std::uint32_t>(w.row(i.rows[0])[l]) + i.number;
        w.block->issue_copy(w, l, {to, from[l], i.bytes, static_cast<std::uint8_t>(read), i.line});
        from[l] |= read == 0 ? kWindowMask : 0;  // moves nothing
    });
    std::uint32_t moving = 0;
    for_lanes(lanes, [&](unsigned l) {
        if ((from[l] & kWindowMask) == 0) moving |= 1u << l;
    });
    if (moving != 0) w.block->count(Space::kGlobal, from, moving, i.bytes);
    return Flow::kNext;
}

Flow commit_copies(Warp& w, const Instruction&, std::uint32_t lanes) {
    for_lanes(lanes, [&](unsigned l) {
        w.groups[l].push_back(std::move(w.open[l]));
        w.open[l].clear();
    });
    return Flow::kNext;
}

Flow wait_for_copies(Warp& w, const Instruction& i, std::uint32_t lanes) {
    for_lanes(lanes, [&](unsigned l) {
        while (w.groups[l].size() > i.number) {
            w.block->deliver(w, l, w.groups[l].front());
            w.groups[l].pop_front();
        }
        if (i.detail == 0) return;  // wait_all: also what was not committed
        w.block->deliver(w, l, w.open[l]);
        w.open[l].clear();
    });
    return Flow::kNext;
}

}  // namespace

bool decode_async_copy(std::string_view opcode, Decoding& d, Instruction& out) {
    if (opcode != "cp" || !d.take("async")) return false;
    if (d.take("bulk")) {
        decode_bulk_copy(d, out);
        return true;
    }
    if (d.take("commit_group")) {
        out.run = &commit_copies;
        return true;
    }
    const bool all = d.take("wait_all");
    if (all || d.take("wait_group")) {
        out.detail = all;
        out.number = all ? 0 : static_cast<std::uint32_t>(d.integer(d.operand(0)));
        out.run = &wait_for_copies;
        return true;
    }
    if (d.take_any({"ca", "cg"}).empty()) d.refuse();
    if (d.take_any({"shared", "shared::cta"}).empty() || !d.take("global")) d.refuse();
    d.take_any({"L2::64B", "L2::128B", "L2::256B"});
    if (d.operand_count() < 3 || d.operand_count() > 4) d.refuse();
    Instruction target;
    d.address(d.operand(0), target, 0);
    d.address(d.operand(1), out, 1);
    out.rows[0] = target.rows[0];
    out.number = static_cast<std::uint32_t>(target.offset);
    out.bytes = static_cast<std::uint8_t>(d.integer(d.operand(2)));
    if (out.bytes != 4 && out.bytes != 8 && out.bytes != 16) d.refuse();
    out.rows[2] = d.operand_count() == 4 ? d.source(d.operand(3)) : kNoRow;
    out.run = &copy_async;
    return true;
}

bool decode_memory(std::string_view opcode, Decoding& d, Instruction& out) {
    if (opcode == "ld" || opcode == "ldu")
        loading(d, out);
    else if (opcode == "st")
        storing(d, out);
    else if (opcode == "atom")
        atomic_operation(d, out, true);
    else if (opcode == "red")
        atomic_operation(d, out, false);
    else if (opcode == "membar" || opcode == "prefetch") {
        // Memory is sequentially consistent here; fences order nothing for the checker.
        while (!d.take_any({"cta", "gl", "sys", "global", "L1", "L2", "tensormap"}).empty()) {
        }
        out.run = [](Warp&, const Instruction&, std::uint32_t) { return Flow::kNext; };
    } else {
        return false;
    }
    return true;
}

}  // namespace emulator::ptx
