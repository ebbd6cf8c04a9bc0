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
    // `accessor`: the thread, or in its place an agent that acts for it.
    Check(const Block& block, const Warp& warp, unsigned lane, unsigned accessor, Access kind,
          bool shared, int line)
        : block_(block),
          warp_(warp),
          lane_(lane),
          thread_(accessor),
          asynchronous_(accessor != warp.thread(lane)),
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
            report(what, "%s at line %d after a %s by %s, with nothing between that orders them",
                   verb(), line_, earlier, block_.who(other).c_str());
        }
    }

    // What an ordinary write left must be fenced before the asynchronous proxy may see it.
    void require_fence(const Cell& cell) {
        if (!asynchronous_ || fence_reported_ || cell.written < block_.started_ ||
            cell.writer / 32u >= block_.warp_count() ||
            block_.fenced(warp_, lane_, cell.writer, cell.written)) {
            return;
        }
        fence_reported_ = true;
        block_.about(warp_, lane_);
        report(
            "proxy-fence",
            "asynchronous %s at line %d, %s, of what %s wrote, with no fence.proxy.async between",
            verb(), line_, block_.opcode_at(line_), block_.who(cell.writer).c_str());
    }

    void against(const char* earlier, Time when, unsigned other) {
        if (when == kNever || when < (shared_ ? block_.started_ : launch_started())) return;
        if (when < block_.started_ || !block_.ordered(warp_, lane_, other, when)) {
            race(earlier, when, other);
        }
    }

    void write(Cell& cell) {
        const bool atomic = kind_ == Access::kAtomic;
        if (!atomic || !cell.atomically) against("write", cell.written, cell.writer);
        if (cell.written != kNever) require_fence(cell);
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
        if (cell.written != kNever) require_fence(cell);
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
    bool asynchronous_;
    Access kind_;
    bool shared_;
    int line_;
    bool race_reported_ = false;
    bool fence_reported_ = false;
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
                                   std::size_t bytes, Access kind, int line, unsigned accessor,
                                   std::size_t alignment) {
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
    if (address % alignment != 0) {
        about(warp, lane);
        refuse_address("misaligned", "global", address, bytes, line);
    }
    if (!options().check) return p;
    Counters& c = counters();
    (kind == Access::kRead ? c.read_bytes : c.written_bytes) += bytes;
    Check(*this, warp, lane, accessor, kind, false, line)
        .run(buffer->cells.data() + (p - buffer->base), bytes);
    return p;
}

unsigned char* Block::reach_shared(Warp& warp, unsigned lane, std::uint64_t address,
                                   std::size_t bytes, Access kind, int line, unsigned accessor) {
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
               "%s at line %d of shared memory that a copy of thread %u is still to write",
               kind == Access::kRead ? "read" : "write", line, in_flight_[address + i] - 1u);
        break;
    }
    Check(*this, warp, lane, accessor, kind, true, line).run(cells_.data() + address, bytes);
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
            return reach_global(warp, lane, address, bytes, kind, line, warp.thread(lane), bytes);
        case Space::kShared:
            return reach_shared(warp, lane, address, bytes, kind, line, warp.thread(lane));
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

unsigned char* Block::reach_async(Warp& warp, unsigned lane, Space space, std::uint64_t address,
                                  std::size_t bytes, Access kind, int line, unsigned agent) {
    if (space == Space::kShared) {
        return reach_shared(warp, lane, address, bytes, kind, line, agent * 32);
    }
    return reach_global(warp, lane, address, bytes, kind, line, agent * 32, 1);
}

std::string Block::who(unsigned thread) const {
    const unsigned agent = thread / 32;
    const unsigned warps = warp_count();
    if (agent < warps) return "thread " + std::to_string(thread);
    if (agent < 3 * warps) return "a bulk store of warp " + std::to_string((agent - warps) % warps);
    const unsigned group = agent - 3 * warps;
    if (group < warpgroups_.size()) return "wgmma of warpgroup " + std::to_string(group);
    for (const auto& [at, barrier] : mbarriers_) {
        if (barrier.agent == agent) return "a bulk copy to the mbarrier at " + std::to_string(at);
    }
    return "a bulk copy";
}

}  // namespace emulator::ptx
