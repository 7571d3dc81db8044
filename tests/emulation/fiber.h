// Threads of execution that take turns on one thread of the operating system: each has a stack, and
// runs until it switches to another.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(DIFFIT_EMULATION_UCONTEXT)
#include <ucontext.h>
#endif

namespace diffit::emulation {

class Fiber {
 public:
  // Stands for its owner, on the stack that the owner has, until prepare() gives it one.
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;

  // The next switch to this fiber calls `function`, which ends by exit_to().
  void prepare(void (*function)());

  // From this fiber, which must be the one that runs, to another. Returns when one switches back.
  void switch_to(Fiber& other) { leave(other, false); }
  [[noreturn]] void exit_to(Fiber& other);

 private:
  static void begin();
  void leave(Fiber& other, bool forever);

  void (*function_)() = nullptr;
  void* stack_ = nullptr;         // what prepare() mapped: a guard page, then the stack
  const void* bottom_ = nullptr;  // of the stack, whoever owns it
  size_t size_ = 0;
  void* sanitizer_stack_ = nullptr;  // what AddressSanitizer keeps of a fiber that does not run
#if defined(__x86_64__) && !defined(DIFFIT_EMULATION_UCONTEXT)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace diffit::emulation
