// A head's biases in shared memory, for the Hopper family: windows of tiles of 128 tokens, W wide.
#pragma once

#include "cuda/window.cuh"

namespace diffit::cuda {

// Whether scores can start from bias / scale, and be compared before they are multiplied by it.
constexpr bool hopper_serves_scale(float scale) { return scale >= 0x1p-20f && scale <= 0x1p20f; }

// Biases of a head, divided by the scale: two copies of a flipped table, so that a thread's two
// neighbouring keys are neighbouring floats, aligned to both: the second copy, for threads of odd
// g, is one float behind. The bias of a query in row y_i, column x_i of the window and a key in
// y_j, x_j is at
//
//     (y_i - y_j + h - 1) 2w + (x_j - x_i + w - 1) + (0 or 1)
template <int W>
struct HopperBiases {
  static constexpr int kRow = 2 * W;
  // The two copies begin 16 banks apart, where a warp's reads of both do not meet.
  static constexpr int copy_floats(int h) { return (2 * h - 1) * kRow + (W == 8 ? 0 : 16); }
  static constexpr int bytes(int h) { return 2 * copy_floats(h) * 4; }
  // From 128 keys to the next, and from 128 queries to the ones before: so many floats back. Of
  // sixteen keys, how far from the first of a tile.
  static constexpr int kTile = 256;
  static constexpr int sixteenth(int u) { return W == 32 ? 16 * (u % 2) - 64 * (u / 2) : -32 * u; }
  // To the bias of the key 8 tokens on, for the same query.
  static constexpr int kNext = W == 8 ? -kRow : 8;

  // With `exchanged`, for keys in the place of queries, and queries in that of keys.
  static __device__ __forceinline__ void fill(float* biases, const Input& table, int h, int head,
                                              int heads, float scale, int thread, int threads,
                                              bool exchanged = false) {
    constexpr int kOffsets = 2 * W - 1;
    const int copy = copy_floats(h), rows = (2 * h - 1) * kOffsets;
    const float factor = 1.f / scale;
#pragma unroll 4  // so many loads under way
    for (int row = thread; row < rows; row += threads) {
      const int64_t from = exchanged ? rows - 1 - row : row;
      const float bias = table.data ? load_number(table, from * heads + head) * factor : 0.f;
      const int at = row / kOffsets * kRow + kOffsets - 1 - row % kOffsets;
      biases[at + 1] = bias;
      biases[copy + at] = bias;
    }
  }

  // For keys 2t and 2t + 1 of a window's first tile and query `token` (of this thread: g and a
  // multiple of 16) of its first block.
  static __device__ __forceinline__ const float* start(const float* biases, int h, int token,
                                                       int t) {
    const int odd = token % 2;
    return biases + odd * copy_floats(h) + (token / W + h - 1) * kRow + W - token % W + 2 * t - odd;
  }

  // Scores of 64 keys, or of 32, of which `at` is the place of the first ones.
  template <int N>
  static __device__ __forceinline__ void load(float (&scores)[N], const float* at) {
#pragma unroll
    for (int u = 0; u < N / 8; ++u) {
      const float* of = at + sixteenth(u);
      // Query and key 8 tokens on, both: the same offset.
      const float2 same = *reinterpret_cast<const float2*>(of);
      const float2 next = *reinterpret_cast<const float2*>(of + kNext);
      const float2 last = *reinterpret_cast<const float2*>(of - kNext);
      scores[8 * u] = same.x, scores[8 * u + 1] = same.y;
      scores[8 * u + 2] = last.x, scores[8 * u + 3] = last.y;
      scores[8 * u + 4] = next.x, scores[8 * u + 5] = next.y;
      scores[8 * u + 6] = same.x, scores[8 * u + 7] = same.y;
    }
  }
};

}  // namespace diffit::cuda
