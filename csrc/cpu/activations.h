// GELU and SiLU with their slopes: finite, and right in the limit, for every finite x.
#pragma once

#include "cpu/simd.h"

namespace diffit::DIFFIT_ISA {

struct ValueAndSlope {
  Vec value, slope;
};

// 2^x for x <= 0, to 2e-7 of it: with arguments rounded before, good for numbers added to 1, as in
// a sigmoid. x = n + f, |f| <= 1/2: n goes to the exponent, 2^f is a Chebyshev interpolation.
DIFFIT_INLINE Vec exp2(Vec x) {
#if DIFFIT_LANES == 16
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const Vec n = (Vec)_mm512_roundscale_ps((__m512)x, kNearest);
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, kNearest);  // 0 for -infinity
#else
  x = x < -127.0f ? fill(-127.0f) : x;
  const Vec shifter = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = x + shifter;
  const Vec f = x - (shifted - shifter);
#endif
  Vec p = fill(0.000154614449f);
  p = p * f + 0.0013400428f;
  p = p * f + 0.00961805694f;
  p = p * f + 0.0555032715f;
  p = p * f + 0.240226507f;
  p = p * f + 0.693147182f;
  p = p * f + 1.0f;
#if DIFFIT_LANES == 16
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * bits_as<Vec>((bits_as<Ints>(shifted) - bits_as<Ints>(shifter) + 127) << 23);
#endif
}

// σ(x) for x given in units of ln 2, and the larger and the smaller of σ and 1 - σ, each to its own
// last digits.
struct Sigmoid {
  DIFFIT_INLINE explicit Sigmoid(Vec x) {
    const Vec decay = exp2(bits_as<Vec>(bits_as<Words>(x) | 0x80000000u));  // of -|x|
    larger = 1.0f / (1.0f + decay);
    smaller = decay * larger;
    value = x < 0.0f ? smaller : larger;
  }
  Vec larger, smaller, value;
};

constexpr float kPerLn2 = 1.44269504f;

// z σ(z) and σ + z σ (1 - σ).
DIFFIT_INLINE ValueAndSlope silu_and_slope(Vec z) {
  const Sigmoid sigmoid(z * kPerLn2);
  return {z * sigmoid.value, sigmoid.value + z * (sigmoid.larger * sigmoid.smaller)};
}

// With u = √(2/π) (x + 0.044715 x³), ½ (1 + tanh u) is σ(2u): x σ and σ + x 2u' σ (1 - σ).
struct TanhGelu {
  static DIFFIT_INLINE ValueAndSlope at(Vec x) {
    // Past |x| = 20 σ is 0 or 1 to the last digit: the bound only keeps 2u' from overflowing, which
    // would make NaN of its product with σ (1 - σ) = 0.
    Vec square = x * x;
    square = square < 400.0f ? square : fill(400.0f);
    const Sigmoid sigmoid(x * (kPerLn2 * 1.59576912f + kPerLn2 * 0.0713548163f * square));
    const Vec rise = 1.59576912f + 0.214064449f * square;
    return {x * sigmoid.value, sigmoid.value + x * (rise * (sigmoid.larger * sigmoid.smaller))};
  }
};

// x Φ(x) and Φ(x) + x φ(x). The tail Φ(-|x|) is exp(-x²/2) R(|x|), where R falls slowly: it is u
// times a polynomial in u = 1 / (1 + 0.26 |x|) to 2e-8 of itself.
struct ExactGelu {
  static DIFFIT_INLINE ValueAndSlope at(Vec x) {
    const Vec decay = exp2(-0.5f * kPerLn2 * x * x);
    const Vec size = bits_as<Vec>(bits_as<Words>(x) & 0x7fffffffu);
    const Vec u = 1.0f / (1.0f + 0.26f * size);
    Vec p = fill(0.0307836942f);
    p = p * u - 0.154189795f;
    p = p * u + 0.254318804f;
    p = p * u - 0.154207408f;
    p = p * u + 0.163221031f;
    p = p * u + 0.0500467494f;
    p = p * u + 0.103285462f;
    p = p * u + 0.102980211f;
    p = p * u + 0.103761263f;
    const Vec tail = decay * (u * p);
    const Vec share = x < 0.0f ? tail : 1.0f - tail;
    return {x * share, share + x * (0.398942280f * decay)};
  }
};

}  // namespace diffit::DIFFIT_ISA
