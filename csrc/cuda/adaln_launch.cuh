// What the launchers of adaln's kernels have in common.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/ptx/numbers.cuh"

namespace diffit::cuda {

constexpr int ceil_divide(int a, int b) { return (a + b - 1) / b; }
constexpr int round_up(int a, int b) { return ceil_divide(a, b) * b; }

// The least power of two that is not less.
inline int power_of_two(int at_least) {
  int power = 1;
  while (power < at_least) power *= 2;
  return power;
}

inline int bytes(Number number) { return number == Number::kFloat32 ? 4 : 2; }

inline std::string describe(const char* kernel, const AdaLN& a) {
  return std::string(kernel) + " of " + std::to_string(a.samples) + " x " +
         std::to_string(a.tokens) + " x " + std::to_string(a.channels);
}

inline void check_sizes(const AdaLN& a) {
  const int64_t rows = int64_t(a.samples) * a.tokens;
  if (rows < 1 || rows > 1 << 30 || a.channels < 1 || a.channels > kAdaLNChannels) {
    throw std::runtime_error(describe("adaln", a) + ": not so many rows or channels");
  }
}

inline bool per_sample(const Modulation& m) { return m.data && !m.token_stride; }

// Where no sample has anything of its own, they are as one. Absent tensors have no stride.
inline AdaLN normal(AdaLN a) {
  check_sizes(a);
  for (Modulation* m : {&a.gate, &a.shift, &a.scale}) {
    if (!m->data) *m = {};
  }
  if (!per_sample(a.gate) && !per_sample(a.shift) && !per_sample(a.scale)) {
    a.tokens *= a.samples;
    a.samples = 1;
  }
  return a;
}

// Whether all rows of all tensors can be read and written in vectors, of 16 bytes of x.
inline bool in_vectors(const AdaLN& a) {
  const int v = 16 / bytes(a.number);
  if (a.channels % v != 0) return false;
  const auto fits = [&](const void* data, Number number, int64_t stride = 0) {
    const int unit = std::min(16, v * bytes(number));
    return reinterpret_cast<uintptr_t>(data) % unit == 0 && stride * bytes(number) % unit == 0;
  };
  const void* const activations[] = {a.x, a.out, a.residual, a.grad_out, a.grad_residual, a.dx};
  for (const void* data : activations) {
    if (!fits(data, a.number)) return false;
  }
  for (const Modulation& m : {a.gate, a.shift, a.scale}) {
    if (!fits(m.data, m.number, m.sample_stride) || !fits(m.grad, m.number)) return false;
  }
  return fits(a.y.data, a.y.number) && fits(a.dy, a.y.number) &&
         fits(a.weight.data, a.weight.number) && fits(a.bias.data, a.bias.number);
}

template <class Function>
void with_x(const AdaLN& a, const Function& function) {
  if (a.number == Number::kFloat32) return function(float{});
  if (a.number == Number::kBFloat16) return function(BFloat16{});
  function(Float16{});
}

}  // namespace diffit::cuda
