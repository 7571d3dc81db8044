// The one inner loop of the attention kernels: a small product whose right side lies in vectors.
//
//     out[m, n] = sum over k of left[m, k] right[k, n] + more[m, n]
//
// with n along the lanes. What is added comes last, so that sums are not rounded at its size. An
// element of the left side is broadcast from wherever it lies, so either side of any of attention's
// products can be read in place. Elements are 32 bits wide: a float, or a pair of bfloat16 numbers
// adjacent in k, whose two products one instruction adds to a float.
#pragma once

#include "cpu/simd.h"

namespace diffit::DIFFIT_ISA {

struct Floats {
  static constexpr int kNumbers = 1;  // of an element
  static DIFFIT_INLINE Vec join(const Vec* numbers) { return *numbers; }
  static DIFFIT_INLINE void store_left(float* left, int64_t index, Vec value) {
    store(left + index, value);
  }
  static DIFFIT_INLINE Vec multiply_add(Vec sum, const float* left, Vec right) {
    return *left * right + sum;
  }
};

#if defined(DIFFIT_BFLOAT16_DOT)
struct BFloat16Pairs {
  static constexpr int kNumbers = 2;
  static DIFFIT_INLINE Vec join(const Vec* numbers) {
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)numbers[1], (__m512)numbers[0]);
    return (Vec)_mm512_permutexvar_epi16(order, both);
  }
  static DIFFIT_INLINE void store_left(float* left, int64_t index, Vec value) {
    store(reinterpret_cast<BFloat16*>(left) + index, value);
  }
  static DIFFIT_INLINE Vec multiply_add(Vec sum, const float* left, Vec right) {
    int32_t pair;
    std::memcpy(&pair, left, sizeof pair);
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)right);
  }
};
#endif

// A matrix by its first element and the distances between neighbours, in elements.
struct Left {
  const float* data;
  int64_t row, step;
};
struct Rows {  // of vectors side by side
  const float* data;
  int64_t row;
};

// M rows of `out`, V vectors wide: M · V sums in registers.
template <class Elements, int M, int V>
DIFFIT_INLINE void tile(Left left, Rows right, int64_t steps, Rows more, float* out, int64_t row) {
  Vec sums[M][V] = {};
  const float* l = left.data;
  const float* r = right.data;
  for (int64_t k = 0; k < steps; ++k, l += left.step, r += right.row) {
    Vec across[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) across[v] = load(r + v * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        sums[m][v] = Elements::multiply_add(sums[m][v], l + m * left.row, across[v]);
      }
    }
  }
  if (more.data) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[m][v] += load(more.data + m * more.row + v * kLanes);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(out + m * row + v * kLanes, sums[m][v]);
  }
}

// As many rows at a time as the registers hold beside the right side's vectors.
constexpr int kTileRows = kLanes == 16 ? 8 : 4;

// `rows` rows of `out`, V vectors wide. more.data may be null, or `out`.
template <class Elements, int V>
inline void product(int64_t rows, Left left, Rows right, int64_t steps, Rows more, float* out,
                    int64_t row) {
  auto advance = [&](int64_t by) {
    left.data += by * left.row;
    if (more.data) more.data += by * more.row;
    out += by * row;
    rows -= by;
  };
  for (; rows >= kTileRows; advance(kTileRows)) {
    tile<Elements, kTileRows, V>(left, right, steps, more, out, row);
  }
  if (rows & 4) {
    tile<Elements, 4, V>(left, right, steps, more, out, row);
    advance(4);
  }
  if (rows & 2) {
    tile<Elements, 2, V>(left, right, steps, more, out, row);
    advance(2);
  }
  if (rows & 1) tile<Elements, 1, V>(left, right, steps, more, out, row);
}

// Terms that are summed in one go. Longer sums are cut into equal parts, as their rounding errors
// grow with their length.
constexpr int64_t kTerms = 96;

// Any number of columns, a multiple of the lanes: two vectors at a time, then one.
template <class Elements>
inline void wide_product(int64_t rows, int64_t columns, Left left, Rows right, int64_t steps,
                         Rows more, float* out, int64_t row) {
  const int64_t parts = (steps + kTerms - 1) / kTerms;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = steps * part / parts, count = steps * (part + 1) / parts - first;
    const Left l = {left.data + first * left.step, left.row, left.step};
    const float* r = right.data + first * right.row;
    if (part) more = {out, row};
    int64_t n = 0;
    for (; n + 2 * kLanes <= columns; n += 2 * kLanes) {
      product<Elements, 2>(rows, l, {r + n, right.row}, count,
                           {more.data ? more.data + n : nullptr, more.row}, out + n, row);
    }
    if (n < columns) {
      product<Elements, 1>(rows, l, {r + n, right.row}, count,
                           {more.data ? more.data + n : nullptr, more.row}, out + n, row);
    }
  }
}

}  // namespace diffit::DIFFIT_ISA
