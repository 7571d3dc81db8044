// Half-precision numbers as 16 bits each, two to a register, and the fast exponential.
#pragma once

#include <cstdint>

namespace diffit::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Two numbers in a register, each rounded to nearest even; `low` is the first in memory.
template <class E>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

template <>
__device__ __forceinline__ uint32_t pack<Float16>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// The numbers of a register.
template <class E>
__device__ __forceinline__ void unpack(uint32_t both, float& low, float& high);

template <>
__device__ __forceinline__ void unpack<BFloat16>(uint32_t both, float& low, float& high) {
  low = __uint_as_float(both << 16);
  high = __uint_as_float(both & 0xffff0000u);
}

template <>
__device__ __forceinline__ void unpack<Float16>(uint32_t both, float& low, float& high) {
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(low), "=f"(high)
      : "r"(both));
}

// 2^x to about 2^-22; 0 for -inf.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace diffit::cuda
