#include "fiber.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

#if defined(__x86_64__)
// void emulator_switch(void** save, void* load). Only what a callee must preserve (System V ABI,
// x86-64); the floating-point control words never change here.
asm(R"(
.text
.p2align 4
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
extern "C" void emulator_switch(void** save, void* load);
#endif

namespace emulator {

#if defined(__x86_64__)

void switch_context(Context& from, Context& to) {
    emulator_switch(&from.stack_pointer, to.stack_pointer);
}

void prepare_context(Context& context, unsigned char* stack, std::size_t bytes, void (*entry)()) {
    // Stacks lie a power of two apart; without an offset all their tops would share cache sets.
    const std::size_t index = reinterpret_cast<std::size_t>(stack) / bytes;
    auto** top = reinterpret_cast<void**>(stack + bytes - 64 - index * 320 % 4096);
    *--top = nullptr;  // return address of entry, which does not return; keeps the ABI's alignment
    *--top = reinterpret_cast<void*>(entry);
    for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
    context.stack_pointer = top;
}

#else

void switch_context(Context& from, Context& to) { swapcontext(&from.saved, &to.saved); }

void prepare_context(Context& context, unsigned char* stack, std::size_t bytes, void (*entry)()) {
    getcontext(&context.saved);
    context.saved.uc_stack.ss_sp = stack;
    context.saved.uc_stack.ss_size = bytes;
    context.saved.uc_link = nullptr;
    makecontext(&context.saved, entry, 0);
}

#endif

Stacks::Stacks(unsigned count) : total_(count * kBytes) {
    void* memory = mmap(nullptr, total_, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<unsigned char*>(memory);
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    for (unsigned i = 0; i < count; ++i) mprotect(of(i), page, PROT_NONE);
}

Stacks::~Stacks() { munmap(base_, total_); }

}  // namespace emulator
