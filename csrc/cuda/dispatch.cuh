// From a call's sizes to the kernels that were compiled for them.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/window_attention.cuh"

namespace diffit::cuda {

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// Calls `function` with an element (E{}) and a constant (D).
template <class Function>
void with_element_and_head_dim(const WindowAttention& a, const Function& function) {
  const auto with_head_dim = [&](auto element) {
    switch (a.head_dim) {
      case 32:
        return function(element, Constant<32>{});
      case 64:
        return function(element, Constant<64>{});
      case 72:
        return function(element, Constant<72>{});
      case 96:
        return function(element, Constant<96>{});
      case 128:
        return function(element, Constant<128>{});
    }
    throw std::runtime_error("head_dim must be 32, 64, 72, 96 or 128, got " +
                             std::to_string(a.head_dim));
  };
  if (a.number == Number::kBFloat16) return with_head_dim(BFloat16{});
  if (a.number == Number::kFloat16) return with_head_dim(Float16{});
  throw std::runtime_error("tensor cores take bfloat16 and float16");
}

constexpr int kHopperSharedMemory = 227 * 1024;  // that a block may have on sm_90

// Calls `function` with the width of a window that the Hopper family serves, as a constant.
template <class Function>
void with_width(int width, const Function& function) {
  switch (width) {
    case 8:
      return function(Constant<8>{});
    case 16:
      return function(Constant<16>{});
    case 32:
      return function(Constant<32>{});
  }
  throw std::runtime_error("windows must be 8, 16 or 32 wide, got " + std::to_string(width));
}

// A call for the text of an error.
struct Description {
  const char* kernel;
  const WindowAttention& a;

  operator std::string() const {
    const auto text = [](int64_t number) { return std::to_string(number); };
    return std::string(kernel) + " of " + text(a.batch) + " x " + text(a.height) + " x " +
           text(a.width) + " tokens, " + text(a.heads) + " heads of " + text(a.head_dim) +
           ", windows of " + text(a.window_height) + " x " + text(a.window_width);
  }
};

inline Description describe(const char* kernel, const WindowAttention& a) { return {kernel, a}; }

// How blocks of threads walk over the `items` of each head: as many at a time as the device runs,
// so that none waits for another to end, and each takes about the same number of items.
// `shared_bytes` is a function of the stages, of which there are at most `stages`: as many as fit.
template <class Arguments, class SharedBytes>
Walk walk_over(int items, int heads, void (*kernel)(Arguments), const SharedBytes& shared_bytes,
               const Description& what, int stages = 2) {
  if (shared_bytes(stages) > shared_memory_limit()) stages = 1;
  const int resident = resident_blocks(kernel, kThreads, shared_bytes(stages), what);
  const int splits = std::clamp(resident / heads, 1, std::max(items, 1));
  const int each = (items + splits - 1) / splits;
  return {items, (items + each - 1) / each, stages};
}

}  // namespace diffit::cuda
