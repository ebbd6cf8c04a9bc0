#include "block.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "emulator.hpp"
#include "report.hpp"

namespace emulator {
namespace {

ThreadView view;
Block* running_block = nullptr;

}  // namespace

ThreadView& current_thread() { return view; }
Block* current_block() { return running_block; }

bool Site::operator==(const Site& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
}

std::string Site::text() const {
    if (file == nullptr) return "(unknown)";
    const char* slash = std::strrchr(file, '/');
    return std::string(slash != nullptr ? slash + 1 : file) + ":" + std::to_string(line);
}

Block::Block(unsigned threads)
    : threads_(threads), warps_((threads + 31) / 32), stacks_(threads), ready_(threads) {
    shared_.bytes.assign(SharedMemory::kCapacity, 0xff);
    shared_.cells.resize(SharedMemory::kCapacity);
}

void Block::make_ready(unsigned index) {
    threads_[index].state = Thread::State::kReady;
    ready_[(ready_begin_ + ready_count_) % ready_.size()] = index;
    ++ready_count_;
}

void Block::enter(unsigned index) {
    current_ = &threads_[index];
    view.linear = index;
    view.thread = current_->index;
}

unsigned Block::take_ready() {
    if (options().schedule > 1) {
        const std::size_t pick = (ready_begin_ + random_() % ready_count_) % ready_.size();
        std::swap(ready_[ready_begin_], ready_[pick]);
    }
    const unsigned next = ready_[ready_begin_];
    ready_begin_ = (ready_begin_ + 1) % ready_.size();
    --ready_count_;
    return next;
}

// Continues some ready thread; returns when `me` is continued.
void Block::run_next(Thread& me) {
    if (ready_count_ == 0) {  // all have returned, or none can go on: for run() to find out
        switch_context(me.context, main_);
        return;
    }
    enter(take_ready());
    if (current_ != &me) switch_context(me.context, current_->context);
}

void Block::abandon() {
    abandoned_ = true;
    switch_context(current_->context, main_);
    std::abort();  // an abandoned thread is never continued
}

void Block::thread_main() {
    Block& block = *running_block;
    block.body_(block.argument_);
    block.exit_current();
    std::abort();
}

void Block::exit_current() {
    Thread& me = *current_;
    me.state = Thread::State::kDone;
    ++done_;
    const std::uint32_t lane = 1u << (view.linear % 32);
    Warp& warp = warps_[view.linear / 32];
    warp.exited |= lane;
    for (const Collective& c : warp.slots) {
        if (c.unread != 0 && c.arrived != c.mask && (c.mask & lane) != 0) {
            report("warp-mask", "returned while lanes %08x wait for it at %s", c.arrived,
                   c.site.text().c_str());
        }
    }
    if (waiting_ > 0 && waiting_ + done_ == threads_.size()) {
        report("barrier-after-exit",
               "the last of %u threads to return; %u wait at __syncthreads %s", done_, waiting_,
               barrier_site_.text().c_str());
        complete_barrier();
    }
    run_next(me);
}

void Block::complete_barrier() {
    barrier_time_ = advance_time();
    waiting_ = 0;
    ++counters().barriers;
    for (unsigned i = 0; i < threads_.size(); ++i) {
        if (threads_[i].state == Thread::State::kAtBarrier) make_ready(i);
    }
}

void Block::barrier(Site site) {
    if (waiting_ > 0 && !(site == barrier_site_)) {
        report("divergent-barrier", "__syncthreads at %s while %u threads wait at %s",
               site.text().c_str(), waiting_, barrier_site_.text().c_str());
    }
    if (done_ > 0) {
        report("barrier-after-exit", "__syncthreads at %s after %u threads have returned",
               site.text().c_str(), done_);
    }
    Thread& me = *current_;
    barrier_site_ = me.site = site;
    me.state = Thread::State::kAtBarrier;
    if (++waiting_ + done_ == threads_.size()) complete_barrier();
    run_next(me);
}

Collective& Block::warp_operation(WarpOp op, std::uint32_t mask, const void* in, std::size_t bytes,
                                  Site site) {
    Warp& warp = warps_[view.linear / 32];
    const unsigned lane = view.linear % 32;
    const std::uint32_t bit = 1u << lane;
    mask &= warp.present;
    if ((mask & bit) == 0) {
        report("warp-mask", "lane %u is not in its own mask %08x at %s", lane, mask,
               site.text().c_str());
    }
    if ((mask & warp.exited) != 0) {
        report("warp-mask", "mask %08x names lanes %08x that have returned, at %s", mask,
               mask & warp.exited, site.text().c_str());
    }
    mask = (mask & ~warp.exited) | bit;

    Collective* joined = nullptr;
    for (Collective& c : warp.slots) {
        const bool open = c.unread != 0 && c.arrived != c.mask;
        if (open && c.mask == mask && (c.arrived & bit) == 0) {
            joined = &c;
        } else if (open && (c.mask & mask) != 0) {
            report("warp-diverged", "mask %08x at %s while lanes %08x wait with mask %08x at %s",
                   mask, site.text().c_str(), c.arrived, c.mask, c.site.text().c_str());
        }
    }
    if (joined == nullptr) {
        for (Collective& c : warp.slots) {
            if (c.unread == 0) joined = &c;
        }
        if (joined == nullptr) {
            report("warp-diverged", "more than 4 operations of one warp wait for lanes");
            abandon();
        }
        joined->mask = joined->unread = mask;
        joined->arrived = 0;
        joined->op = op;
        joined->site = site;
    } else if (joined->op != op || !(joined->site == site)) {
        report("warp-diverged", "lanes of one warp meet at different operations: %s and %s",
               joined->site.text().c_str(), site.text().c_str());
    }
    if (bytes > 0) std::memcpy(joined->data[lane], in, bytes);
    joined->arrived |= bit;

    Thread& me = *current_;
    if (joined->arrived != joined->mask) {
        me.state = Thread::State::kInWarpOp;
        me.site = site;
        run_next(me);
        return *joined;
    }
    ++counters().warp_operations;
    if (op == WarpOp::kSyncWarp) {  // in CUDA, too, shuffles and votes do not order memory
        const Time t = advance_time();
        if (mask == warp.present) {
            warp.synced = t;
        } else {
            if (!warp.pair_synced) warp.pair_synced = std::make_unique<Time[]>(32 * 32);
            for (unsigned i = 0; i < 32; ++i) {
                for (unsigned j = 0; j < 32; ++j) {
                    if ((mask >> i & 1) && (mask >> j & 1)) warp.pair_synced[i * 32 + j] = t;
                }
            }
        }
    }
    for (unsigned i = 0; i < 32; ++i) {
        if ((mask >> i & 1) && i != lane) make_ready(view.linear - lane + i);
    }
    return *joined;
}

void Block::finish_warp_operation(Collective& collective) {
    collective.unread &= ~(1u << (view.linear % 32));
}

unsigned char* Block::shared_variable(const void* key, std::size_t bytes, std::size_t alignment) {
    const auto known = shared_.offset_of.find(key);
    if (known != shared_.offset_of.end()) return shared_.bytes.data() + known->second;
    constexpr std::size_t kGap = 16;  // unallocated, so that an overrun is seen
    const std::size_t offset = (shared_.used + kGap + alignment - 1) / alignment * alignment;
    if (offset + bytes > SharedMemory::kCapacity) {
        report("launch", "more than %zu bytes of shared memory", SharedMemory::kCapacity);
        abandon();
    }
    shared_.used = offset + bytes;
    for (std::size_t i = 0; i < bytes; ++i) shared_.cells[offset + i].allocated = true;
    shared_.offset_of.emplace(key, offset);
    return shared_.bytes.data() + offset;
}

void Block::count_access() {
    if (++accesses_ <= kMostAccesses) return;
    report("deadlock", "the block has made %llu accesses and does not end",
           static_cast<unsigned long long>(kMostAccesses));
    abandon();
}

bool Block::on_own_stack(const void* p) const {
    const auto offset = static_cast<const unsigned char*>(p) - stacks_.of(view.linear);
    return offset >= 0 && offset < static_cast<std::ptrdiff_t>(Stacks::kBytes);
}

bool Block::ordered_before_now(unsigned other, Time when) const {
    const unsigned me = view.linear;
    if (other == me || when < barrier_time_) return true;
    if (other / 32 != me / 32) return false;
    const Warp& warp = warps_[me / 32];
    if (when < warp.synced) return true;
    return warp.pair_synced != nullptr && when < warp.pair_synced[other % 32 * 32 + me % 32];
}

void Block::report_deadlock() {
    unsigned at_barrier = 0;
    for (const Thread& t : threads_) at_barrier += t.state == Thread::State::kAtBarrier;
    for (std::size_t w = 0; w < warps_.size(); ++w) {
        for (const Collective& c : warps_[w].slots) {
            if (c.unread == 0 || c.arrived == c.mask) continue;
            enter(static_cast<unsigned>(w) * 32 +
                  static_cast<unsigned>(__builtin_ctz(c.arrived & c.unread)));
            report("deadlock",
                   "lanes %08x of warp %zu wait at %s for lanes %08x, which never come; %u threads "
                   "have returned, %u wait at __syncthreads",
                   c.arrived, w, c.site.text().c_str(), c.mask & ~c.arrived, done_, at_barrier);
        }
    }
    for (unsigned i = 0; i < threads_.size(); ++i) {
        if (threads_[i].state != Thread::State::kAtBarrier) continue;
        enter(i);
        report("deadlock", "%u threads have returned, %u wait at __syncthreads, one at %s", done_,
               at_barrier, threads_[i].site.text().c_str());
        return;
    }
}

bool Block::run(void (*body)(void*), void* argument) {
    const auto count = static_cast<unsigned>(threads_.size());
    body_ = body;
    argument_ = argument;
    done_ = waiting_ = 0;
    abandoned_ = false;
    ready_begin_ = ready_count_ = 0;
    started_ = barrier_time_ = advance_time();
    std::fill_n(shared_.bytes.begin(), shared_.used, 0xff);  // what the block before could touch
    std::fill_n(shared_.cells.begin(), shared_.used, Cell{});
    shared_.offset_of.clear();
    shared_.used = 0;
    for (Warp& warp : warps_) warp = Warp{};
    const dim3& dim = view.block_dim;
    for (unsigned i = 0; i < count; ++i) {
        threads_[i].index = {i % dim.x, i / dim.x % dim.y, i / (dim.x * dim.y)};
        warps_[i / 32].present |= 1u << (i % 32);
        prepare_context(threads_[i].context, stacks_.of(i), Stacks::kBytes, thread_main);
    }
    for (unsigned i = 0; i < count; ++i) make_ready(options().schedule == 1 ? count - 1 - i : i);

    accesses_ = 0;
    running_block = this;
    enter(take_ready());
    switch_context(main_, current_->context);
    if (!abandoned_ && done_ < count) {
        report_deadlock();
        abandoned_ = true;
    }
    running_block = nullptr;
    current_ = nullptr;
    return !abandoned_;
}

}  // namespace emulator
