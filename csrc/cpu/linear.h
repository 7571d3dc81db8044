// A product of matrices with a bias: what a linear layer computes, and its input's gradient.
//
//     out[m, n] = sum over k of left[m, k] right[k, n] + bias[n]
//
// Right is packed by panels, two vectors of n wide, which stay in the second cache while all rows
// of left pass by. Sums have kTerms terms at most in one chain: more exact than chains as long as
// the product, and as fast.
#pragma once

#include "cpu/packing.h"

namespace diffit::DIFFIT_ISA {

constexpr int64_t kPanel = 2 * kLanes;

// panel (terms, kPanel) = right's columns from `first` on; those behind its last are zero.
inline void pack_panel(const Linear& a, int64_t first, float* panel) {
  const int64_t count = std::min(kPanel, a.columns - first);
  if (!a.transposed) {
    for (int64_t k = 0; k < a.terms; ++k) {
      for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
        const int64_t n = std::clamp<int64_t>(count - lane, 0, kLanes);
        const float* from = a.right + k * a.columns + first + lane;
        store(panel + k * kPanel + lane, n == kLanes ? load(from) : n ? load(from, n) : Vec{});
      }
    }
    return;
  }
  for (int64_t lane = 0; lane < kPanel; lane += kLanes) {
    for (int64_t k = 0; k < a.terms; k += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, a.terms - k);
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const float* from = a.right + (first + lane + i) * a.terms + k;
        square[i] = lane + i >= count ? Vec{} : n == kLanes ? load(from) : load(from, n);
      }
      transpose(square);
      for (int64_t i = 0; i < n; ++i) store(panel + (k + i) * kPanel + lane, square[i]);
    }
  }
}

// sums (rows, kPanel) = rows of left times the panel. Whole tiles are told all distances that can
// be known when this is compiled: they take an eighth less time.
inline void multiply(const float* left, int64_t rows, const float* panel, int64_t terms,
                     float* sums) {
  const int64_t parts = (terms + kTerms - 1) / kTerms;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t from = terms * part / parts, count = terms * (part + 1) / parts - from;
    const Left l = {left + from, terms, 1};
    const Rows right = {panel + from * kPanel, kPanel}, more = {part ? sums : nullptr, kPanel};
    if (rows == kTileRows) {
      tile<Floats, kTileRows, 2>(l, right, count, more, sums, kPanel);
    } else {
      product<Floats, 2>(rows, l, right, count, more, sums, kPanel);
    }
  }
}

// Tasks are panels of columns, each cut into blocks of rows.
inline void linear(const Linear& a, int64_t begin, int64_t end) {
  Scratch scratch(Scratch::round(a.terms * kPanel) + kTileRows * kPanel);
  float* panel = scratch.take(a.terms * kPanel);
  float* sums = scratch.take(kTileRows * kPanel);
  for (int64_t task = begin, packed = -1; task < end; ++task) {
    const int64_t block = task % a.blocks, first = task / a.blocks * kPanel;
    if (first != packed) pack_panel(a, packed = first, panel);
    const int64_t last = (block + 1) * a.rows / a.blocks;
    for (int64_t m = block * a.rows / a.blocks; m < last; m += kTileRows) {
      const int64_t rows = std::min<int64_t>(kTileRows, last - m);
      multiply(a.left + m * a.terms, rows, panel, a.terms, sums);
      for (int64_t lane = 0; lane < kPanel && first + lane < a.columns; lane += kLanes) {
        const int64_t n = std::min<int64_t>(kLanes, a.columns - first - lane);
        const Vec bias = a.bias ? load(a.bias + first + lane, n) : Vec{};
        for (int64_t i = 0; i < rows; ++i) {
          float* to = a.out + (m + i) * a.columns + first + lane;
          const Vec value = load(sums + i * kPanel + lane) + bias;
          n == kLanes ? store(to, value) : store(to, value, n);
        }
      }
    }
  }
}

}  // namespace diffit::DIFFIT_ISA
