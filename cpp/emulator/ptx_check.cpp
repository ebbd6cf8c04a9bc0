// Memory accesses: bounds, alignment, initialisation, races; sectors and wavefronts.
#include <algorithm>
#include <cstring>
#include <vector>

#include "block.hpp"
#include "device_memory.hpp"
#include "emulator.hpp"
#include "ptx_machine.hpp"
#include "report.hpp"

namespace emulator::ptx {

// The access being checked: its bytes share one report per kind.
class Block::Check {
  public:
    Check(const Block& block, const Warp& warp, unsigned lane, Access kind, bool shared, int line)
        : block_(block),
          warp_(warp),
          lane_(lane),
          thread_(warp.thread(lane)),
          kind_(kind),
          shared_(shared),
          line_(line) {}

    void run(Cell* cells, std::size_t bytes) {
        for (std::size_t i = 0; i < bytes; ++i) {
            if (kind_ == Access::kRead) {
                read(cells[i]);
            } else {
                write(cells[i]);
            }
        }
    }

  private:
    const char* verb() const { return kind_ == Access::kRead ? "read" : "write"; }

    void race(const char* earlier, Time when, unsigned other) {
        if (race_reported_) return;
        race_reported_ = true;
        const char* what = shared_ ? "race-shared" : "race-global";
        block_.about(warp_, lane_);
        if (when < block_.started_) {
            report(what, "%s at line %d after a %s by another block of this launch", verb(), line_,
                   earlier);
        } else {
            report(what, "%s at line %d after a %s by thread %u, with no barrier between", verb(),
                   line_, earlier, other);
        }
    }

    void against(const char* earlier, Time when, unsigned other) {
        if (when == kNever || when < (shared_ ? block_.started_ : launch_started())) return;
        if (when < block_.started_ || !block_.ordered(thread_, other, when)) {
            race(earlier, when, other);
        }
    }

    void write(Cell& cell) {
        const bool atomic = kind_ == Access::kAtomic;
        if (!atomic || !cell.atomically) against("write", cell.written, cell.writer);
        against("read", cell.read[0], cell.reader[0]);
        against("read", cell.read[1], cell.reader[1]);
        if (!shared_ && (cell.written == kNever || cell.written < launch_started())) {
            ++counters().unique_written_bytes;
        }
        cell.written = now();
        cell.writer = static_cast<std::uint16_t>(thread_);
        cell.atomically = atomic;
    }

    void read(Cell& cell) {
        against("write", cell.written, cell.writer);
        const auto me = static_cast<std::uint16_t>(thread_);
        if (cell.written == kNever) {
            if (!uninitialised_reported_) {
                uninitialised_reported_ = true;
                block_.about(warp_, lane_);
                report(shared_ ? "uninit-shared" : "uninit-global",
                       "read at line %d, %s, of what nothing wrote", line_,
                       block_.opcode_at(line_));
            }
            cell.written = shared_ ? block_.started_ : kBeforeAnyLaunch;
            cell.writer = me;
        }
        if (!shared_ && cell.read[0] < launch_started() && cell.read[1] < launch_started()) {
            ++counters().unique_read_bytes;
        }
        remember(cell, me);
    }

    // The two readers kept are of different warps where there were two: a barrier orders warps.
    void remember(Cell& cell, std::uint16_t me) const {
        const bool fresh = cell.read[0] < block_.started_;
        const bool apart =
            cell.reader[0] / 32 != cell.reader[1] / 32 && cell.read[1] >= block_.started_;
        if (fresh || (cell.reader[0] != me && (!apart || cell.reader[0] / 32 != me / 32))) {
            cell.read[1] = cell.read[0];
            cell.reader[1] = cell.reader[0];
        }
        cell.read[0] = now();
        cell.reader[0] = me;
    }

    const Block& block_;
    const Warp& warp_;
    unsigned lane_;
    unsigned thread_;
    Access kind_;
    bool shared_;
    int line_;
    bool race_reported_ = false;
    bool uninitialised_reported_ = false;
};

namespace {

[[noreturn]] void refuse_address(const char* kind, const char* space, std::uint64_t address,
                                 std::size_t bytes, int line) {
    report(kind, "%zu bytes of %s memory at 0x%llx, line %d", bytes, space,
           static_cast<unsigned long long>(address), line);
    throw Abandoned{};
}

}  // namespace

const char* Block::opcode_at(int line) const {
    for (const Instruction& i : program_.code) {
        if (i.line == line) return i.text->c_str();
    }
    return "?";
}

unsigned char* Block::reach_global(Warp& warp, unsigned lane, std::uint64_t address,
                                   std::size_t bytes, Access kind, int line) {
    auto* p = reinterpret_cast<unsigned char*>(address);
    const DeviceBuffer* nearest = nullptr;
    DeviceBuffer* buffer = find_buffer(p, bytes, &nearest);
    if (buffer == nullptr) {
        about(warp, lane);
        const bool known = is_device_address(p) && nearest != nullptr;
        report("out-of-bounds", "%s of %zu bytes at line %d, %lld bytes into a buffer of %zu",
               kind == Access::kRead ? "read" : "write", bytes, line,
               known ? static_cast<long long>(p - nearest->base) : -1LL,
               known ? nearest->bytes : std::size_t{0});
        throw Abandoned{};
    }
    if (address % bytes != 0) {
        about(warp, lane);
        refuse_address("misaligned", "global", address, bytes, line);
    }
    if (!options().check) return p;
    Counters& c = counters();
    (kind == Access::kRead ? c.read_bytes : c.written_bytes) += bytes;
    Check(*this, warp, lane, kind, false, line)
        .run(buffer->cells.data() + (p - buffer->base), bytes);
    return p;
}

unsigned char* Block::reach_shared(Warp& warp, unsigned lane, std::uint64_t address,
                                   std::size_t bytes, Access kind, int line) {
    if (bytes > shared_.size() || address > shared_.size() - bytes || !cells_[address].allocated ||
        !cells_[address + bytes - 1].allocated) {
        about(warp, lane);
        refuse_address("out-of-bounds", "shared", address, bytes, line);
    }
    if (address % bytes != 0) {
        about(warp, lane);
        refuse_address("misaligned", "shared", address, bytes, line);
    }
    if (!options().check) return shared_.data() + address;
    for (std::size_t i = 0; i < bytes; ++i) {
        if (in_flight_[address + i] == 0) continue;
        about(warp, lane);
        report("async-copy",
               "%s at line %d of shared memory that a cp.async of thread %u is still to write",
               kind == Access::kRead ? "read" : "write", line, in_flight_[address + i] - 1u);
        break;
    }
    Check(*this, warp, lane, kind, true, line).run(cells_.data() + address, bytes);
    return shared_.data() + address;
}

unsigned char* Block::reach(Warp& warp, unsigned lane, Space space, std::uint64_t address,
                            std::size_t bytes, Access kind, int line) {
    if (space == Space::kGeneric) {
        switch (address & kWindowMask) {
            case kSharedWindow:
                space = Space::kShared;
                break;
            case kLocalWindow:
                space = Space::kLocal;
                break;
            case kParamWindow:
                space = Space::kParam;
                break;
            default:
                space = Space::kGlobal;
        }
        address &= ~kWindowMask;
    } else if (space == Space::kShared) {
        address &= 0xffffffffu;  // of a 32-bit register
    }
    switch (space) {
        case Space::kGlobal:
        case Space::kGeneric:
            return reach_global(warp, lane, address, bytes, kind, line);
        case Space::kShared:
            return reach_shared(warp, lane, address, bytes, kind, line);
        case Space::kLocal: {
            const std::size_t each = program_.kernel->local_bytes;
            if (bytes > each || address > each - bytes || address % bytes != 0) {
                about(warp, lane);
                refuse_address("out-of-bounds", "local", address, bytes, line);
            }
            return warp.local.data() + lane * each + address;
        }
        case Space::kParam:
            if (bytes > launch_.params.size() || address > launch_.params.size() - bytes ||
                kind != Access::kRead) {
                about(warp, lane);
                refuse_address("out-of-bounds", "parameter", address, bytes, line);
            }
            // Only read: the type is for the other spaces.
            return const_cast<unsigned char*>(launch_.params.data()) + address;
    }
    return nullptr;
}

namespace {

// Distinct units of `size` bytes that the accesses touch; sorted in `units`.
void distinct_units(const std::uint64_t* addresses, std::size_t count, std::size_t bytes,
                    std::uint64_t size, std::vector<std::uint64_t>& units) {
    units.clear();
    for (std::size_t i = 0; i < count; ++i) {
        const std::uint64_t last = (addresses[i] + bytes - 1) / size;
        for (std::uint64_t u = addresses[i] / size; u <= last; ++u) units.push_back(u);
    }
    std::sort(units.begin(), units.end());
    units.erase(std::unique(units.begin(), units.end()), units.end());
}

}  // namespace

void Block::count(Space space, const std::uint64_t* addresses, std::uint32_t lanes,
                  std::size_t bytes) {
    if (!options().count_transactions || !options().check) return;
    std::uint64_t at[32];
    std::size_t n = 0;
    for_lanes(lanes, [&](unsigned l) { at[n++] = addresses[l]; });
    if (space == Space::kGeneric) {
        const std::uint64_t window = at[0] & kWindowMask;
        space = window == 0 ? Space::kGlobal : window == kSharedWindow ? Space::kShared : space;
    }
    std::vector<std::uint64_t> units;
    if (space == Space::kGlobal) {
        constexpr std::uint64_t kSector = 32;
        distinct_units(at, n, bytes, kSector, units);
        counters().sectors += units.size();
        counters().min_sectors += std::min<std::uint64_t>(units.size(), (n * bytes + 31) / kSector);
    } else if (space == Space::kShared) {
        // 32 banks of 4 bytes. Lanes that access 8 or 16 bytes are served by half or quarter warps.
        const std::size_t together = bytes >= 16 ? 8 : bytes == 8 ? 16 : 32;
        for (std::size_t begin = 0; begin < n; begin += together) {
            distinct_units(at + begin, std::min(together, n - begin), bytes, 4, units);
            std::uint64_t of_bank[32] = {};
            std::uint64_t passes = 0;
            for (const std::uint64_t u : units) passes = std::max(passes, ++of_bank[u % 32]);
            counters().wavefronts += passes;
            counters().min_wavefronts += (units.size() + 31) / 32;
        }
    }
}

void Block::issue_copy(Warp& warp, unsigned lane, const PendingCopy& copy) {
    // The write may happen from now on, so it must be ordered after what others did there.
    reach_shared(warp, lane, copy.to, copy.bytes, Access::kWrite, copy.line);
    if (copy.from_bytes > 0) {
        // Read in pieces that are aligned as the whole is.
        std::size_t piece = copy.from_bytes;
        while (copy.from_bytes % piece != 0 || (piece & (piece - 1)) != 0) --piece;
        for (std::size_t i = 0; i < copy.from_bytes; i += piece) {
            reach(warp, lane, Space::kGeneric, copy.from + i, piece, Access::kRead, copy.line);
        }
    }
    const auto owner = static_cast<std::uint16_t>(warp.thread(lane) + 1);
    std::fill_n(in_flight_.begin() + copy.to, copy.bytes, owner);
    warp.open[lane].push_back(copy);
}

void Block::deliver(Warp& warp, unsigned lane, const std::vector<PendingCopy>& copies) {
    for (const PendingCopy& copy : copies) {
        unsigned char* to = shared_.data() + copy.to;
        std::memset(to, 0, copy.bytes);
        if (copy.from_bytes > 0) {
            std::memcpy(to, reinterpret_cast<const void*>(copy.from), copy.from_bytes);
        }
        for (std::size_t i = 0; i < copy.bytes; ++i) {
            cells_[copy.to + i].written = now();
            cells_[copy.to + i].writer = static_cast<std::uint16_t>(warp.thread(lane));
            in_flight_[copy.to + i] = 0;
        }
    }
}

}  // namespace emulator::ptx
