// Where a window's tokens lie, what is read once for many windows, and the time token.
#pragma once

#include <cstdint>

#include "cuda/kernels.h"
#include "cuda/ptx/numbers.cuh"

namespace diffit::cuda {

constexpr float kLog2e = 1.4426950408889634f;

// Division of numbers from 0 to 2^31 - 1 by one that is known before, in a few instructions.
struct Divisor {
  int value, shift;
  uint32_t factor;  // 2^shift / value, rounded up

  explicit Divisor(int value) : value(value), shift(31) {
    while ((int64_t{1} << (shift - 31)) < value) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << shift) + value - 1) / value);
  }
  __device__ __forceinline__ int divide(int x) const {
    return static_cast<int>((static_cast<uint64_t>(static_cast<uint32_t>(x)) * factor) >> shift);
  }
};

// Windows in the order of their samples, rows and columns.
struct Windows {
  int tokens, count;          // tokens of a window; windows in all
  Divisor of_sample, across;  // windows of a sample, and of a row of its windows
  int height, width;          // of a window
  int grid_width;
  int64_t grid_tokens;

  explicit Windows(const WindowAttention& a)
      : tokens(a.tokens()),
        count(a.windows()),
        of_sample(a.windows_of_sample()),
        across(a.width / a.window_width),
        height(a.window_height),
        width(a.window_width),
        grid_width(a.width),
        grid_tokens(int64_t{a.height} * a.width) {}

  // The row of the (B, H, W) grid at which a window starts.
  __device__ __forceinline__ int64_t start(int window) const {
    const int sample = this->sample(window), rest = window - sample * of_sample.value;
    const int down = across.divide(rest), right = rest - down * across.value;
    return sample * grid_tokens + int64_t{down} * height * grid_width + right * width;
  }
  __device__ __forceinline__ int sample(int window) const { return of_sample.divide(window); }
  // Of a token: how far from its window's start.
  __device__ __forceinline__ int offset(int token) const {
    return token / width * grid_width + token % width;
  }
  // Of a token: its place, such that a pair's row in the table is
  // place(query) - place(key) + center().
  __device__ __forceinline__ int place(int token) const {
    return token / width * (2 * width - 1) + token % width;
  }
  constexpr int center() const { return (height - 1) * (2 * width - 1) + width - 1; }
  constexpr int table_size() const { return (2 * height - 1) * (2 * width - 1); }
  constexpr int padded_tokens() const { return (tokens + 127) / 128 * 128; }
};

// What a block of threads keeps in shared memory for one head and all windows.
struct Kept {
  float* table;  // a head's biases times log2 e; zeros where there are none
  int* offsets;  // of tokens; 0 beyond the last
  int* places;   // likewise, in bytes

  static constexpr int bytes(const Windows& windows) {
    return 8 * windows.padded_tokens() + (windows.table_size() + 3) / 4 * 16;
  }

  __device__ __forceinline__ Kept(unsigned char* memory, const Windows& windows)
      : table(reinterpret_cast<float*>(memory) + 2 * windows.padded_tokens()),
        offsets(reinterpret_cast<int*>(memory)),
        places(reinterpret_cast<int*>(memory) + windows.padded_tokens()) {}

  // A query's bias for the key of place p is bias(of_query, -p); a key's for a query's,
  // bias(of_key, p).
  __device__ __forceinline__ const char* of_query(const Windows& windows, int token) const {
    return reinterpret_cast<const char*>(table + windows.center()) + places[token];
  }
  __device__ __forceinline__ const char* of_key(const Windows& windows, int token) const {
    return reinterpret_cast<const char*>(table + windows.center()) - places[token];
  }
  static __device__ __forceinline__ float bias(const char* of, int place) {
    return *reinterpret_cast<const float*>(of + place);
  }
};

// The numbers of a register, the first in memory as x.
template <class E>
__device__ __forceinline__ float2 pair(uint32_t both) {
  float2 numbers;
  unpack<E>(both, numbers.x, numbers.y);
  return numbers;
}

__device__ __forceinline__ float2 pair(Number number, uint32_t both) {
  return number == Number::kBFloat16 ? pair<BFloat16>(both) : pair<Float16>(both);
}

__device__ __forceinline__ float load_number(const Input& input, int64_t index) {
  if (input.number == Number::kFloat32) return static_cast<const float*>(input.data)[index];
  return pair(input.number, static_cast<const uint16_t*>(input.data)[index]).x;
}

__device__ __forceinline__ void store_number(void* data, Number number, int64_t index, float x) {
  if (number == Number::kFloat32) {
    static_cast<float*>(data)[index] = x;
  } else {
    const uint32_t bits =
        number == Number::kBFloat16 ? pack<BFloat16>(x, 0.f) : pack<Float16>(x, 0.f);
    static_cast<uint16_t*>(data)[index] = static_cast<uint16_t>(bits);
  }
}

// All threads; a barrier of the block must follow.
__device__ __forceinline__ void fill(const Kept& kept, const Windows& windows, const Input& table,
                                     int head, int heads) {
  for (int token = threadIdx.x; token < windows.padded_tokens(); token += blockDim.x) {
    const bool valid = token < windows.tokens;
    kept.offsets[token] = valid ? windows.offset(token) : 0;
    kept.places[token] = valid ? 4 * windows.place(token) : 0;
  }
  for (int row = threadIdx.x; row < windows.table_size(); row += blockDim.x) {
    const float bias = table.data ? load_number(table, int64_t{row} * heads + head) : 0.f;
    kept.table[row] = bias * kLog2e;
  }
}

// One head's part of the time token, from `first` on: the lane's two numbers of each 8.
template <int N>
__device__ __forceinline__ void load_time(float2 (&time)[N], const Input& temb, int64_t first) {
  first += threadIdx.x % 4 * 2;
  if (temb.number == Number::kFloat32) {
    const auto* from = static_cast<const float*>(temb.data) + first;
#pragma unroll
    for (int n = 0; n < N; ++n) time[n] = *reinterpret_cast<const float2*>(from + 8 * n);
  } else {
    const auto* from = static_cast<const uint16_t*>(temb.data) + first;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      time[n] = pair(temb.number, *reinterpret_cast<const uint32_t*>(from + 8 * n));
    }
  }
}

}  // namespace diffit::cuda
