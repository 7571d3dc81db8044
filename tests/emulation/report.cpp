#include "report.h"

#include <signal.h>
#include <unistd.h>

#include <cstring>
#include <string>

#include "device.h"

namespace diffit::emulation {
namespace {

void (*describe_crash)(char* text, size_t size) = nullptr;

void write_note() {
  if (describe_crash == nullptr) return;
  char text[1000];
  describe_crash(text, sizeof text);
  [[maybe_unused]] const auto written = write(STDERR_FILENO, text, strnlen(text, sizeof text));
}

#if !defined(__SANITIZE_ADDRESS__)
constexpr int kSignals[] = {SIGSEGV, SIGBUS};
struct sigaction before[2];
stack_t stack_before;

// Leaves the rest to who would have had the signal, and will: the instruction is tried again.
void on_signal(int) {
  write_note();
  for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &before[i], nullptr);
}
#endif

}  // namespace

#if defined(__SANITIZE_ADDRESS__)

CrashNote::CrashNote(void (*describe)(char*, size_t)) { describe_crash = describe; }
CrashNote::~CrashNote() { describe_crash = nullptr; }

#else

CrashNote::CrashNote(void (*describe)(char*, size_t)) {
  describe_crash = describe;
  static char memory[64 * 1024];  // the thread's own stack may be what has run out
  stack_t stack{};
  stack.ss_sp = memory;
  stack.ss_size = sizeof memory;
  sigaltstack(&stack, &stack_before);
  struct sigaction action{};
  action.sa_handler = on_signal;
  action.sa_flags = SA_ONSTACK;
  for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &action, &before[i]);
}

CrashNote::~CrashNote() {
  for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &before[i], nullptr);
  sigaltstack(&stack_before, nullptr);
  describe_crash = nullptr;
}

#endif

}  // namespace diffit::emulation

#if defined(__SANITIZE_ADDRESS__)
// AddressSanitizer calls this before its report.
extern "C" void __asan_on_error() { diffit::emulation::write_note(); }
#endif

// all_statistics() for ctypes: a line for each kernel, with tabs between its parts.
extern "C" const char* diffit_emulation_statistics() {
  static std::string text;
  text.clear();
  for (const auto& [what, of] : diffit::emulation::all_statistics()) {
    text += what + "\t" + std::to_string(of.launches) + "\t" + std::to_string(of.shared_bytes) +
            "\t" + std::to_string(of.bank_conflicts) + "\t" + of.where + "\n";
  }
  return text.c_str();
}
