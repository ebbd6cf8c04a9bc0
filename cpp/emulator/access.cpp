#include "access.hpp"

#include "block.hpp"
#include "device_memory.hpp"
#include "emulator.hpp"
#include "host_memory.hpp"
#include "report.hpp"

namespace emulator {
namespace {

// The access being checked: its bytes share one report per kind.
struct Check {
    Block& block;
    Access kind;
    bool shared;
    const void* address;
    const void* site;
    bool race_reported = false;
    bool uninitialised_reported = false;

    const char* verb() const { return kind == Access::kRead ? "read" : "write"; }

    void race(const char* earlier, Time when, unsigned thread) {
        if (race_reported) return;
        race_reported = true;
        const char* what = shared ? "race-shared" : "race-global";
        if (when < block.started()) {
            report(what, "%s at %s after a %s by another block of this launch", verb(),
                   module_offset(site).c_str(), earlier);
        } else {
            report(what, "%s at %s after a %s by thread %u, with no barrier between", verb(),
                   module_offset(site).c_str(), earlier, thread);
        }
    }

    // Whether an access at `when` may race with this one at all.
    bool concurrent(Time when, unsigned thread) const {
        if (when < (shared ? block.started() : launch_started())) return false;
        return when < block.started() || !block.ordered_before_now(thread, when);
    }

    void against_write(const Cell& cell) {
        if (cell.written == kNever || (kind == Access::kAtomic && cell.atomically)) return;
        if (concurrent(cell.written, cell.writer)) race("write", cell.written, cell.writer);
    }

    void against_reads(const Cell& cell) {
        for (int i = 0; i < 2; ++i) {
            if (cell.read[i] != kNever && concurrent(cell.read[i], cell.reader[i])) {
                race("read", cell.read[i], cell.reader[i]);
            }
        }
    }
};

void check_write(Check& check, Cell& cell) {
    check.against_write(cell);
    check.against_reads(cell);
    if (!check.shared && (cell.written == kNever || cell.written < launch_started())) {
        ++counters().unique_written_bytes;
    }
    cell.written = now();
    cell.writer = static_cast<std::uint16_t>(current_thread().linear);
    cell.atomically = check.kind == Access::kAtomic;
}

void check_read(Check& check, Cell& cell) {
    const auto me = static_cast<std::uint16_t>(current_thread().linear);
    check.against_write(cell);
    if (cell.written == kNever) {
        if (!check.uninitialised_reported) {
            check.uninitialised_reported = true;
            report(check.shared ? "uninit-shared" : "uninit-global",
                   "read at %s of what nothing wrote", module_offset(check.site).c_str());
        }
        cell.written = check.shared ? check.block.started() : kBeforeAnyLaunch;
        cell.writer = me;
    }
    if (!check.shared && cell.read[0] < launch_started() && cell.read[1] < launch_started()) {
        ++counters().unique_read_bytes;
    }
    if (cell.reader[0] != me || cell.read[0] < check.block.started()) {
        cell.reader[1] = cell.reader[0];
        cell.read[1] = cell.read[0];
        cell.reader[0] = me;
    }
    cell.read[0] = now();
}

void check_cells(Check check, Cell* cells, std::size_t bytes) {
    for (std::size_t i = 0; i < bytes; ++i) {
        if (check.kind == Access::kRead) {
            check_read(check, cells[i]);
        } else {
            check_write(check, cells[i]);
        }
    }
}

bool misaligned(const void* p, std::size_t bytes) {
    return reinterpret_cast<std::uintptr_t>(p) % bytes != 0;
}

void access_global(Block& block, const unsigned char* p, std::size_t bytes, Access kind,
                   const void* site) {
    const char* verb = kind == Access::kRead ? "read" : "write";
    const DeviceBuffer* nearest;
    DeviceBuffer* buffer = find_buffer(p, bytes, &nearest);
    if (buffer == nullptr) {
        report("out-of-bounds", "%s of %zu bytes at %s, %lld bytes into a buffer of %zu", verb,
               bytes, module_offset(site).c_str(),
               nearest != nullptr ? static_cast<long long>(p - nearest->base) : -1LL,
               nearest != nullptr ? nearest->bytes : std::size_t{0});
        block.abandon();
    }
    if (misaligned(p, bytes)) {
        report("misaligned", "%s of %zu bytes at %s, address %p", verb, bytes,
               module_offset(site).c_str(), static_cast<const void*>(p));
        block.abandon();
    }
    Counters& c = counters();
    (kind == Access::kRead ? c.read_bytes : c.written_bytes) += bytes;
    check_cells({block, kind, false, p, site}, buffer->cells.data() + (p - buffer->base), bytes);
    if (options().count_transactions && kind != Access::kAtomic) {
        record_transaction(false, reinterpret_cast<std::uint64_t>(p), bytes, site);
    }
}

void access_shared(Block& block, std::size_t offset, std::size_t bytes, Access kind,
                   const void* site) {
    SharedMemory& shared = block.shared();
    const unsigned char* p = shared.bytes.data() + offset;
    if (offset + bytes > shared.bytes.size() || !shared.cells[offset].allocated ||
        !shared.cells[offset + bytes - 1].allocated) {
        report("out-of-bounds", "%zu bytes of shared memory at offset %zu, at %s", bytes, offset,
               module_offset(site).c_str());
        block.abandon();
    }
    if (misaligned(p, bytes)) {
        report("misaligned", "%zu bytes of shared memory at offset %zu, at %s", bytes, offset,
               module_offset(site).c_str());
        block.abandon();
    }
    check_cells({block, kind, true, p, site}, shared.cells.data() + offset, bytes);
    if (options().count_transactions && kind != Access::kAtomic) {
        record_transaction(true, offset, bytes, site);
    }
}

}  // namespace

void access(const void* address, std::size_t bytes, Access kind, const void* site) {
    Block* block = current_block();
    if (block == nullptr || !options().check) return;
    block->count_access();
    const auto* p = static_cast<const unsigned char*>(address);
    if (is_device_address(p)) return access_global(*block, p, bytes, kind, site);
    const auto offset = reinterpret_cast<std::uintptr_t>(p) -
                        reinterpret_cast<std::uintptr_t>(block->shared().bytes.data());
    if (offset < SharedMemory::kCapacity) {
        return access_shared(*block, offset, bytes, kind, site);
    }
    if (block->on_own_stack(p) || is_mapped(p, bytes)) return;
    report("out-of-bounds", "%s of %zu bytes at %s, at %p, which is no memory of the device",
           kind == Access::kRead ? "read" : "write", bytes, module_offset(site).c_str(), address);
    block->abandon();
}

}  // namespace emulator
