// V neighbouring numbers of a row, as they lie in memory and as floats.
#pragma once

#include <cstdint>

#include "cuda/ptx/numbers.cuh"
#include "number.h"

namespace diffit::cuda {

// V numbers as they lie in memory; of a single half-precision one, the low half of a register.
template <class X, int V>
struct Vector {
  static constexpr int kBytes = V * sizeof(X), kWords = (kBytes + 3) / 4;
  uint32_t words[kWords];
};

// From memory that the kernel does not write. The address is a multiple of kBytes, or of 16.
template <class X, int V>
__device__ __forceinline__ Vector<X, V> load(const X* from) {
  Vector<X, V> vector;
  if constexpr (vector.kBytes >= 16) {
#pragma unroll
    for (int i = 0; i < vector.kWords; i += 4) {
      const uint4 part = __ldg(reinterpret_cast<const uint4*>(from) + i / 4);
      vector.words[i] = part.x, vector.words[i + 1] = part.y;
      vector.words[i + 2] = part.z, vector.words[i + 3] = part.w;
    }
  } else if constexpr (vector.kBytes == 8) {
    const uint2 both = __ldg(reinterpret_cast<const uint2*>(from));
    vector.words[0] = both.x, vector.words[1] = both.y;
  } else if constexpr (vector.kBytes == 4) {
    vector.words[0] = __ldg(reinterpret_cast<const unsigned*>(from));
  } else {
    vector.words[0] = __ldg(reinterpret_cast<const unsigned short*>(from));
  }
  return vector;
}

template <class X, int V>
__device__ __forceinline__ void store(X* to, const Vector<X, V>& vector) {
  if constexpr (vector.kBytes >= 16) {
#pragma unroll
    for (int i = 0; i < vector.kWords; i += 4) {
      reinterpret_cast<uint4*>(to)[i / 4] = make_uint4(vector.words[i], vector.words[i + 1],
                                                       vector.words[i + 2], vector.words[i + 3]);
    }
  } else if constexpr (vector.kBytes == 8) {
    *reinterpret_cast<uint2*>(to) = make_uint2(vector.words[0], vector.words[1]);
  } else if constexpr (vector.kBytes == 4) {
    *reinterpret_cast<uint32_t*>(to) = vector.words[0];
  } else {
    *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(vector.words[0]);
  }
}

template <class X, int V>
__device__ __forceinline__ void to_floats(float (&to)[V], const Vector<X, V>& vector) {
  if constexpr (sizeof(X) == 4) {
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = __uint_as_float(vector.words[i]);
  } else if constexpr (V == 1) {
    float high;
    unpack<X>(vector.words[0], to[0], high);
  } else {
#pragma unroll
    for (int i = 0; i < V; i += 2) unpack<X>(vector.words[i / 2], to[i], to[i + 1]);
  }
}

template <class X, int V>
__device__ __forceinline__ Vector<X, V> from_floats(const float (&from)[V]) {
  Vector<X, V> vector;
  if constexpr (sizeof(X) == 4) {
#pragma unroll
    for (int i = 0; i < V; ++i) vector.words[i] = __float_as_uint(from[i]);
  } else if constexpr (V == 1) {
    vector.words[0] = pack<X>(from[0], 0.0f);
  } else {
#pragma unroll
    for (int i = 0; i < V; i += 2) vector.words[i / 2] = pack<X>(from[i], from[i + 1]);
  }
  return vector;
}

// Calls `function` with a number of that kind. All threads take the same branch.
template <class Function>
__device__ __forceinline__ void with_number(Number number, const Function& function) {
  if (number == Number::kFloat32) {
    function(float{});
  } else if (number == Number::kBFloat16) {
    function(BFloat16{});
  } else {
    function(Float16{});
  }
}

// Numbers `at` to `at` + V of a tensor of whichever number.
template <int V>
__device__ __forceinline__ void read(float (&to)[V], const void* data, Number number, int64_t at) {
  with_number(number, [&](auto kind) {
    using T = decltype(kind);
    to_floats<T>(to, load<T, V>(static_cast<const T*>(data) + at));
  });
}

template <int V>
__device__ __forceinline__ void write(void* data, Number number, int64_t at,
                                      const float (&from)[V]) {
  with_number(number, [&](auto kind) {
    using T = decltype(kind);
    store(static_cast<T*>(data) + at, from_floats<T>(from));
  });
}

}  // namespace diffit::cuda
