// Twin of csrc/cuda/ptx/numbers.cuh.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "emulation.h"

namespace diffit::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class E>
float to_float(E number);

template <>
inline float to_float(BFloat16 number) {
  return std::bit_cast<float>(uint32_t(number.bits) << 16);
}

// The bits of exponent and fraction are those of a float32 whose exponent is 112 too small, also
// for subnormal numbers; that of infinities and NaNs is then still too small.
template <>
inline float to_float(Float16 number) {
  const uint32_t rest = number.bits & 0x7fffu, sign = uint32_t(number.bits & 0x8000u) << 16;
  uint32_t bits = std::bit_cast<uint32_t>(std::bit_cast<float>(rest << 13) * 0x1p112f);
  if (rest >= 0x7c00u) bits = rest << 13 | 0x7f800000u;
  return std::bit_cast<float>(bits | sign);
}

// To nearest, to even if there are two. As the instructions do it, NaN becomes 0x7fff.
template <class E>
E rounded(float x);

template <>
inline BFloat16 rounded(float x) {
  if (std::isnan(x)) return {0x7fff};
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}

template <>
inline Float16 rounded(float x) {
  if (std::isnan(x)) return {0x7fff};
  const uint16_t sign = std::bit_cast<uint32_t>(x) >> 16 & 0x8000u;
  x = std::fabs(x);
  if (x >= 65520.0f) return {uint16_t(sign | 0x7c00u)};  // half-way from the largest to 2^16
  if (x < 0x1p-14f) {  // subnormal: multiples of 2^-24, which are the last bits of 0.5 and above
    return {uint16_t(sign | (std::bit_cast<uint32_t>(x + 0.5f) - std::bit_cast<uint32_t>(0.5f)))};
  }
  const uint32_t bits = std::bit_cast<uint32_t>(x) - (112u << 23);
  return {uint16_t(sign | (bits + 0xfffu + (bits >> 13 & 1)) >> 13)};
}

template <class E>
uint32_t pack(float low, float high) {
  return rounded<E>(low).bits | uint32_t(rounded<E>(high).bits) << 16;
}

template <class E>
void unpack(uint32_t both, float& low, float& high) {
  low = to_float(E{uint16_t(both)});
  high = to_float(E{uint16_t(both >> 16)});
}

// ex2.approx.ftz: subnormal numbers count as zero, and so do subnormal results.
inline float exp2_approx(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}

}  // namespace diffit::cuda
