// What is said when a kernel kills the process.
#pragma once

#include <cstddef>

namespace diffit::emulation {

// While it lives, the report of a crash (a segmentation fault, an error that AddressSanitizer
// found) begins with a line that `describe` writes: who ran.
class CrashNote {
 public:
  explicit CrashNote(void (*describe)(char* text, size_t size));
  ~CrashNote();
  CrashNote(const CrashNote&) = delete;
};

}  // namespace diffit::emulation
