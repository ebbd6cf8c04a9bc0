// A context that can be left in the middle of a function and continued later, on one OS thread.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

// Where a context was left.
struct Context {
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t saved;
#endif
};

// Leaves `from` and continues `to`; returns when something switches back to `from`.
void switch_context(Context& from, Context& to);

// Makes `context` start `entry` on the given stack. `entry` must never return.
void prepare_context(Context& context, unsigned char* stack, std::size_t bytes, void (*entry)());

// One stack per CUDA thread of a block, with an inaccessible page below each.
class Stacks {
  public:
    static constexpr std::size_t kBytes = 64 << 10;
    explicit Stacks(unsigned count);
    ~Stacks();
    Stacks(const Stacks&) = delete;
    Stacks& operator=(const Stacks&) = delete;
    unsigned char* of(unsigned index) const { return base_ + index * kBytes; }

  private:
    unsigned char* base_;
    std::size_t total_;
};

}  // namespace emulator
