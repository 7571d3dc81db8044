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
// In the end pairs of 16 and 16 tokens that are equally far apart are added, then what has the same
// offset in those.
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

// Pairs of 16 queries and 16 keys whose pairs of tokens have the same offsets, as far apart as the
// 16 queries and keys are: `down` in units of 16 tokens, or of two for windows 32 wide, which are
// also apart by `right` halves of a row.
template <int W>
struct HopperClasses {
  static constexpr int kOfRow = W == 32 ? 3 : 1;
  int groups;  // `down` is less than that apart from 0
  int count;

  __device__ __forceinline__ explicit HopperClasses(int tiles)
      : groups(W == 32 ? 2 * tiles : 4 * tiles), count((groups + (W == 32 ? 3 : 7)) * kOfRow) {}

  __device__ __forceinline__ int at(int down, int right) const {
    const int row = down + groups - 1;
    return right < -1 || right > 1 ? -1 : W == 32 ? row * 3 + right + 1 : row;
  }
  // The 16 keys that are apart from the s-th 16 queries as the class says; negative if none are.
  __device__ __forceinline__ int keys_of(int index, int s) const {
    const int down = index / kOfRow - (groups - 1);
    if (W != 32) return s - down < groups ? s - down : -1;
    const int row = s / 2 - down, half = s % 2 - (index % 3 - 1);
    return row < 0 || row >= groups || half < 0 || half > 1 ? -1 : 2 * row + half;
  }
};

constexpr int kPairRoom = 33 * 192 * 4;  // bytes for the sums of all classes, of up to 4 tiles

// The computing threads, after a barrier: the sums by offset of 128 queries and `tiles` tiles of
// keys, to the part of dtable that belongs to `pair`. `room` has kPairRoom bytes.
template <int W>
__device__ __forceinline__ void store_pair_sums(const HopperBackwardArguments& arguments,
                                                const float2* sums, void* room, int head, int split,
                                                int pairs, int pair, int tiles) {
  constexpr int kAcross = 2 * W - 1;
  const int thread = threadIdx.x - 128, lane = thread % 32;
  const HopperClasses<W> classes(tiles);
  for (int index = thread / 32; index < classes.count; index += 8) {
    float2 of_class[3] = {};
#pragma unroll
    for (int s = 0; s < 8; ++s) {
      const int u = classes.keys_of(index, s);
      if (u < 0) continue;
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        const float2 more = sums[(3 * u + i) * 256 + 32 * s + lane];
        of_class[i].x += more.x;
        of_class[i].y += more.y;
      }
    }
#pragma unroll
    for (int i = 0; i < 3; ++i)
      static_cast<float2*>(room)[(3 * index + i) * 32 + lane] = of_class[i];
  }
  sync_some(1, 256);

  const int key_rows = 64 / W * tiles, offsets = pair_rows(W, tiles) * kAcross;
  float* const to =
      arguments.dtable + ((int64_t{split} * arguments.a.heads + head) * pairs + pair) * offsets;
  for (int offset = thread; offset < offsets; offset += 256) {
    const int dy = offset / kAcross - (key_rows - 1), dx = offset % kAcross - (W - 1);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      // The query, or the key, is the one 8 on: that is a grid row, or 8 columns.
      const int on = i == 1 ? 1 : i == 2 ? -1 : 0, x = W == 8 ? dx : dx - 8 * on;
      const int y = W == 8 ? dy - on : dy;
      if (W == 8 && y % 2 != 0) continue;
      const int right = W == 32 ? (x + 24) / 16 - 1 : 0, apart = x - 16 * right;
      const int index = classes.at(W == 8 ? y / 2 : y, right);
      if (apart < -7 || apart > 7 || index < 0 || index >= classes.count) continue;
      const float* const of_class = static_cast<const float*>(room) + (3 * index + i) * 64;
      for (int g = max(0, apart); g < min(8, 8 + apart); ++g) sum += of_class[9 * g - apart];
    }
    to[offset] = sum;
  }
}

}  // namespace diffit::cuda
