// Sums of dS over windows for pairs of tiles of a window, and by offset in the end: the table's
// gradient of one head, for Hopper.
//
// A thread keeps its part of each product dS of 64 queries and some keys: with wgmma's registers
// 8 u + i for 16 keys from 16 u on,
//
//     i     0, 1                  2, 3                     4, 5                     6, 7
//     of    query g, key 2t..     query g + 8, key 2t..    query g, key 2t + 8..    both 8 on
//
// where the first and the last have the same offset, and are added: 24 numbers of 32 are kept.
#pragma once

#include "cuda/window_attention_hopper_backward.cuh"

namespace diffit::cuda {

// In shared memory: pair i, of 3, of the s-th 16 keys of thread r, of 256, is at (3 s + i) 256 + r.
constexpr int pair_sum_bytes(int tiles) { return tiles * 12 * 256 * int(sizeof(float2)); }

__device__ __forceinline__ void clear_pair_sums(float2* sums, int tiles) {
  for (int i = 0; i < 12 * tiles; ++i) {
    sums[i * 256 + threadIdx.x - 128] = make_float2(0.f, 0.f);
  }
}

// Adds dS of the step-th 2 N keys.
template <int N>
__device__ __forceinline__ void add_pair_sums(float2* sums, int step, const float (&ds)[N]) {
  float2* const to = sums + step * (N / 8 * 3 * 256) + threadIdx.x - 128;
  const auto add = [&](int i, float x, float y) {
    float2 sum = to[256 * i];
    sum.x += x;
    sum.y += y;
    to[256 * i] = sum;
  };
#pragma unroll
  for (int u = 0; u < N / 8; ++u) {
    const float* of = ds + 8 * u;
    add(3 * u, of[0] + of[6], of[1] + of[7]);
    add(3 * u + 1, of[2], of[3]);
    add(3 * u + 2, of[4], of[5]);
  }
}

// Offsets that a block of 128 queries and `tiles` tiles of 64 keys can be apart: so many grid rows,
// times 2w - 1.
constexpr int pair_rows(int width, int tiles) { return (128 + 64 * tiles) / width - 1; }

// The computing threads, after a barrier: the sums by offset, to the part of dtable that belongs to
// `pair`, from tiles `query_tile` of queries and `key_tile` of keys on.
template <int W>
__device__ __forceinline__ void store_pair_sums(const HopperBackwardArguments& arguments,
                                                const float2* sums, int head, int split, int pairs,
                                                int pair, int tiles) {
  constexpr int kAcross = 2 * W - 1, kRows = 128 / W;
  const int key_rows = 64 / W * tiles, offsets = (kRows + key_rows - 1) * kAcross;
  float* const to =
      arguments.dtable + ((int64_t{split} * arguments.a.heads + head) * pairs + pair) * offsets;
  for (int offset = threadIdx.x - 128; offset < offsets; offset += 256) {
    const int dy = offset / kAcross - (key_rows - 1), dx = offset % kAcross - (W - 1);
    float sum = 0;
    for (int y = max(0, dy); y < min(kRows, key_rows + dy); ++y) {
      for (int x = max(0, dx); x < min(W, W + dx); ++x) {
        const int query = y * W + x, key = (y - dy) * W + x - dx;
        if (query & key & 8) continue;  // is added to the pair 8 tokens before
        const int kind = query & 8 ? 1 : key & 8 ? 2 : 0;
        const int thread = query / 16 * 32 + query % 8 * 4 + key % 8 / 2;
        const float2& two = sums[(key / 16 * 3 + kind) * 256 + thread];
        sum += key % 2 ? two.y : two.x;
      }
    }
    to[offset] = sum;
  }
}

}  // namespace diffit::cuda
