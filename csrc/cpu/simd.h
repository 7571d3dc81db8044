// Vectors of floats, as wide as the instruction set this file is compiled for, in the compiler's
// own vector types: arithmetic, comparisons and ?: are the operators. Included by one isa_*.cpp per
// instruction set, which defines DIFFIT_ISA (a namespace) and DIFFIT_LANES (floats of a vector).
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#define DIFFIT_INLINE inline __attribute__((always_inline))

namespace diffit {

// Half-precision numbers as they lie in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

namespace DIFFIT_ISA {

constexpr int kLanes = DIFFIT_LANES;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Shorts __attribute__((vector_size(kLanes * 2)));

template <class To, class From>
DIFFIT_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

DIFFIT_INLINE Vec fill(float value) { return value - Vec{}; }
DIFFIT_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }

// ---- numbers of 16 bits ------------------------------------------------------------------------

// Between 16 and 32 bits: compilers split __builtin_convertvector where one instruction would do.
#if DIFFIT_LANES == 16
DIFFIT_INLINE Words to_words(Shorts bits) { return (Words)_mm512_cvtepu16_epi32((__m256i)bits); }
DIFFIT_INLINE Shorts to_shorts(Words words) {
  return (Shorts)_mm512_cvtepi32_epi16((__m512i)words);
}
#elif DIFFIT_LANES == 8
DIFFIT_INLINE Words to_words(Shorts bits) { return (Words)_mm256_cvtepu16_epi32((__m128i)bits); }
DIFFIT_INLINE Shorts to_shorts(Words words) {
  const __m256i both = (__m256i)words;
  return (Shorts)_mm_packus_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
}
#else
DIFFIT_INLINE Words to_words(Shorts bits) { return __builtin_convertvector(bits, Words); }
DIFFIT_INLINE Shorts to_shorts(Words words) { return __builtin_convertvector(words, Shorts); }
#endif

DIFFIT_INLINE Vec widen(Shorts bits, BFloat16) { return bits_as<Vec>(to_words(bits) << 16); }

// bfloat16's bits, rounded to even, in the upper halves; the lower halves are left as they come.
DIFFIT_INLINE Words round_to_bfloat16(Vec value) {
  Words word = bits_as<Words>(value);
  Words rounded = word + 0x7fffu + ((word >> 16) & 1u);
  return value == value ? rounded : (word | 0x400000u);  // a NaN stays one
}

#if defined(DIFFIT_BFLOAT16_DOT)
DIFFIT_INLINE Shorts narrow(Vec value, BFloat16) {
  return bits_as<Shorts>(_mm512_cvtneps_pbh((__m512)value));
}
#else
DIFFIT_INLINE Shorts narrow(Vec value, BFloat16) {
  return to_shorts(round_to_bfloat16(value) >> 16);
}
#endif

#if DIFFIT_LANES == 16
DIFFIT_INLINE Vec widen(Shorts bits, Half) { return (Vec)_mm512_cvtph_ps((__m256i)bits); }
DIFFIT_INLINE Shorts narrow(Vec value, Half) {
  return (Shorts)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif DIFFIT_LANES == 8
DIFFIT_INLINE Vec widen(Shorts bits, Half) { return (Vec)_mm256_cvtph_ps((__m128i)bits); }
DIFFIT_INLINE Shorts narrow(Vec value, Half) {
  return (Shorts)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
// float16 by exponent arithmetic: its 5 exponent bits, moved into float32's 8, are off by a factor
// of 2^112, which a product puts right, subnormals included.
DIFFIT_INLINE Vec widen(Shorts bits, Half) {
  Words word = __builtin_convertvector(bits, Words);
  Words magnitude = word & 0x7fffu;
  Vec value = bits_as<Vec>(magnitude << 13) * fill(0x1p112f);
  Words special = bits_as<Words>(value) | 0x7f800000u;  // infinity and NaN keep their mantissa
  Words out = magnitude >= 0x7c00u ? special : bits_as<Words>(value);
  return bits_as<Vec>(out | ((word & 0x8000u) << 16));
}

DIFFIT_INLINE Shorts narrow(Vec value, Half) {
  Words word = bits_as<Words>(value), sign = (word >> 16) & 0x8000u, magnitude = word & 0x7fffffffu;
  // A subnormal result is rounded by adding the number whose last bit is float16's smallest step.
  Vec step = bits_as<Vec>(magnitude) + fill(0.5f);
  Words small = bits_as<Words>(step) - 0x3f000000u;
  Words normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  Words out = magnitude < (113u << 23) ? small : normal;
  out = magnitude >= (143u << 23) ? Words{} + 0x7c00u : out;
  out = magnitude > 0x7f800000u ? Words{} + 0x7e00u : out;
  return __builtin_convertvector(out | sign, Shorts);
}
#endif

// ---- memory: a whole vector, or its first n floats with zeros behind them ----------------------

DIFFIT_INLINE Vec load(const float* from) {
  Vec value;
  std::memcpy(&value, from, sizeof(Vec));
  return value;
}
DIFFIT_INLINE void store(float* to, Vec value) { std::memcpy(to, &value, sizeof(Vec)); }

template <class Number>
DIFFIT_INLINE Vec load(const Number* from) {
  Shorts bits;
  std::memcpy(&bits, from, sizeof(Shorts));
  return widen(bits, Number{});
}
template <class Number>
DIFFIT_INLINE void store(Number* to, Vec value) {
  Shorts bits = narrow(value, Number{});
  std::memcpy(to, &bits, sizeof(Shorts));
}

#if DIFFIT_LANES == 16
DIFFIT_INLINE Vec load(const float* from, int n) {
  return (Vec)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), from);
}
DIFFIT_INLINE void store(float* to, Vec value, int n) {
  _mm512_mask_storeu_ps(to, (__mmask16)((1u << n) - 1), (__m512)value);
}
template <class Number>
DIFFIT_INLINE Vec load(const Number* from, int n) {
  return widen((Shorts)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), from), Number{});
}
template <class Number>
DIFFIT_INLINE void store(Number* to, Vec value, int n) {
  _mm256_mask_storeu_epi16(to, (__mmask16)((1u << n) - 1), (__m256i)narrow(value, Number{}));
}
#else
template <class Number>
DIFFIT_INLINE Vec load(const Number* from, int n) {
  Number part[kLanes] = {};
  std::memcpy(part, from, n * sizeof(Number));
  return load(part);
}
template <class Number>
DIFFIT_INLINE void store(Number* to, Vec value, int n) {
  Number part[kLanes];
  store(part, value);
  std::memcpy(to, part, n * sizeof(Number));
}
#endif

// ---- lanes in another order --------------------------------------------------------------------

#if defined(__clang__)
template <int... I>
DIFFIT_INLINE Vec pick(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, I...);
}
#else
template <int... I>
DIFFIT_INLINE Vec pick(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return __builtin_shuffle(a, b, Ints{I...});
}
#endif
template <int... I>
DIFFIT_INLINE Vec interleave_low(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return pick(a, b, std::integer_sequence<int, (I / 2 + I % 2 * kLanes)...>());
}
template <int... I>
DIFFIT_INLINE Vec interleave_high(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return pick(a, b, std::integer_sequence<int, (kLanes / 2 + I / 2 + I % 2 * kLanes)...>());
}
template <int Distance, int... I>
DIFFIT_INLINE Vec swap_lanes(Vec a, std::integer_sequence<int, I...>) {
  return pick(a, a, std::integer_sequence<int, (I ^ Distance)...>());
}
using AllLanes = std::make_integer_sequence<int, kLanes>;

// kLanes vectors become their columns: log2(kLanes) rounds, each of which interleaves the first
// half of the vectors with the second.
DIFFIT_INLINE void transpose(Vec (&rows)[kLanes]) {
  Vec other[kLanes];
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      other[2 * i] = interleave_low(rows[i], rows[i + kLanes / 2], AllLanes());
      other[2 * i + 1] = interleave_high(rows[i], rows[i + kLanes / 2], AllLanes());
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = other[i];
  }
}

// The sum of a vector's floats, in an order that depends on its width alone.
DIFFIT_INLINE float sum(Vec value) {
#if DIFFIT_LANES >= 16
  value += swap_lanes<8>(value, AllLanes());
#endif
#if DIFFIT_LANES >= 8
  value += swap_lanes<4>(value, AllLanes());
#endif
  value += swap_lanes<2>(value, AllLanes());
  value += swap_lanes<1>(value, AllLanes());
  return value[0];
}

// ---- functions ---------------------------------------------------------------------------------

// e^x to 2e-7 of it; 0 below -87.7, infinity above 88.4, NaN for NaN. x = n ln 2 + f, |f| <= ln 2 /
// 2, with ln 2 in two parts: n goes to the exponent, e^f is a polynomial (least squares of degree
// 6).
DIFFIT_INLINE Vec exp(Vec x) {
  const Vec low = fill(-88.02969f), high = fill(88.72284f);  // -127 ln 2, 128 ln 2
  const Vec shifter = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vec shifted = x * fill(1.44269504f) + shifter;
  const Vec n = shifted - shifter;
  Vec f = x - n * fill(0.693145752f);  // its last 9 bits are zero: the product is exact
  f = f - n * fill(1.42860677e-6f);
  Vec p = fill(0.00139464461f);
  p = p * f + fill(0.0083691515f);
  p = p * f + fill(0.0416662619f);
  p = p * f + fill(0.166665167f);
  p = p * f + fill(0.5f);
  p = p * f + fill(1.0f);
  p = p * f + fill(1.0f);
  return p * bits_as<Vec>((bits_as<Ints>(shifted) - bits_as<Ints>(shifter) + 127) << 23);
}

}  // namespace DIFFIT_ISA
}  // namespace diffit
