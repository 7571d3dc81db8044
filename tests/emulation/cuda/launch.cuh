// Twin of csrc/cuda/launch.cuh: a launch runs at once, and has ended when it returns.
#pragma once

#include <algorithm>
#include <string>
#include <type_traits>

#include "emulation.h"

namespace diffit::cuda {

inline unsigned char* shared_memory() { return emulation::shared_memory(); }

inline int multiprocessors() { return emulation::multiprocessors(); }
inline int compute_capability() { return emulation::capability(); }
inline int shared_memory_limit() { return emulation::shared_memory_limit(); }

template <class Arguments>
void allow_shared(void (*)(Arguments), int shared_bytes, const std::string& what) {
  emulation::check_shared(shared_bytes, what);
}

// As many as there is shared memory for, but no more than two a multiprocessor.
template <class Arguments>
int resident_blocks(void (*)(Arguments), int, int shared_bytes, const std::string& what) {
  emulation::check_shared(shared_bytes, what);
  return std::min(2, shared_memory_limit() / std::max(shared_bytes, 1)) * multiprocessors();
}

template <class Arguments>
void launch(void (*kernel)(Arguments), const Arguments& arguments, dim3 grid, int threads,
            int shared_bytes, void*, const std::string& what) {
  static_assert(std::is_trivially_copyable_v<Arguments> && sizeof(Arguments) <= 4096);
  emulation::launch({what, grid, threads, shared_bytes}, [&] { kernel(arguments); });
}

}  // namespace diffit::cuda
