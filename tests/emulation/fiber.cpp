#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// swapcontext makes a system call to save the signal mask each time; this takes a few nanoseconds.
// It saves what a called function must preserve, on the stack, and changes stacks.
#if defined(__x86_64__) && !defined(DIFFIT_EMULATION_UCONTEXT)
extern "C" void diffit_emulation_switch(void** save, void* stack_pointer);
asm(R"(
.text
.type diffit_emulation_switch, @function
diffit_emulation_switch:
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
.size diffit_emulation_switch, . - diffit_emulation_switch
)");
#endif

namespace diffit::emulation {
namespace {

constexpr size_t kGuard = 1024 * 1024;  // more than a frame that overflows is likely to jump
constexpr size_t kStack = 256 * 1024;   // pages that are not touched cost nothing

Fiber* left = nullptr;  // of the switch that goes on
Fiber* entered = nullptr;

}  // namespace

Fiber::~Fiber() {
  if (stack_ != nullptr) munmap(stack_, kGuard + kStack);
}

void Fiber::prepare(void (*function)()) {
  if (stack_ == nullptr) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* stack = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    stack_ = stack;
    mprotect(stack_, kGuard, PROT_NONE);
    bottom_ = static_cast<char*>(stack_) + kGuard;
    size_ = kStack;
  }
#if defined(__SANITIZE_ADDRESS__)
  // The frames that a fiber leaves behind when it exits: begin() and what it called.
  constexpr size_t kFrames = 16 * 1024;
  __asan_unpoison_memory_region(static_cast<const char*>(bottom_) + size_ - kFrames, kFrames);
#endif
  function_ = function;
  sanitizer_stack_ = nullptr;
#if defined(__x86_64__) && !defined(DIFFIT_EMULATION_UCONTEXT)
  // As if begin() had been called, by nobody, and had then called diffit_emulation_switch.
  void** top = reinterpret_cast<void**>(static_cast<char*>(stack_) + kGuard + kStack);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&Fiber::begin);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = static_cast<char*>(stack_) + kGuard;
  context_.uc_stack.ss_size = kStack;
  context_.uc_link = nullptr;
  makecontext(&context_, &Fiber::begin, 0);
#endif
}

void Fiber::begin() {
#if defined(__SANITIZE_ADDRESS__)
  // Also tells where the stack lies that was left, which an owner's fiber does not know.
  __sanitizer_finish_switch_fiber(nullptr, &left->bottom_, &left->size_);
#endif
  entered->function_();
  std::abort();
}

void Fiber::leave(Fiber& other, [[maybe_unused]] bool forever) {
  left = this;
  entered = &other;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(forever ? nullptr : &sanitizer_stack_, other.bottom_, other.size_);
#endif
#if defined(__x86_64__) && !defined(DIFFIT_EMULATION_UCONTEXT)
  diffit_emulation_switch(&stack_pointer_, other.stack_pointer_);
#else
  swapcontext(&context_, &other.context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(sanitizer_stack_, nullptr, nullptr);
#endif
}

void Fiber::exit_to(Fiber& other) {
  leave(other, true);
  std::abort();
}

}  // namespace diffit::emulation
