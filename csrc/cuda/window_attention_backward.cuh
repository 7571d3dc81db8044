// What the backward's kernels share. With P = 2^(score - lse), dP = dO vᵀ, delta_i = Σ_j P_ij
// dP_ij:
//
//     dS = P (dP - delta)    dq = scale dS k    dk = scale dSᵀ (q + q_t)    dv = Pᵀ dO
//     dq_t = Σ dq    dv_t = Σ dO    dtable = Σ dS, over all pairs of an offset
//
// A warp holds 16 rows of S and of dP, or of their transposes, in registers, and makes dq, or dk
// and dv, of them at once: scores are computed twice, and nothing of them passes through memory.
#pragma once

#include "cuda/window_attention.cuh"

namespace diffit::cuda {

struct BackwardArguments {
  WindowAttention a;
  Windows windows;
  Walk walk;
  float* delta;         // (windows, nH, L), of windows of several tiles
  float* dtemb_parts;   // (B, parts of a sample, 2C); or null
  float* dtable_parts;  // (splits, nH, pairs of tiles, offsets of a pair); or null
};

// Which of the two serves a shape.
constexpr bool has_small_kernel(int tokens, int head_dim) {
  return tokens <= 32 || (tokens <= 64 && head_dim <= 72);
}
// `splits`: into how many the windows are cut whose dS a block of threads sums.
void small_backward(const BackwardArguments& arguments, int splits, void* stream);
void large_backward(const BackwardArguments& arguments, int splits, void* stream);

// Tiles of 64 tokens of a window; the grid rows that one lies in, at most; and how many offsets two
// such tiles can be apart, counted from first_difference() grid rows and -(w - 1) columns on.
constexpr int window_tiles(const Windows& windows) { return (windows.tokens + 63) / 64; }
constexpr int tile_rows(const Windows& windows) {
  const int w = windows.width, rows = 64 % w == 0 ? 64 / w : (62 + 2 * w) / w;
  return rows < windows.height ? rows : windows.height;
}
constexpr int pair_offsets(const Windows& windows) {
  return (2 * tile_rows(windows) - 1) * (2 * windows.width - 1);
}
constexpr int first_difference(const Windows& windows, int query_tile, int key_tile) {
  return query_tile * 64 / windows.width - key_tile * 64 / windows.width - tile_rows(windows) + 1;
}

// Adds to the lane's share of each of its two rows' dot product with a row of another matrix.
template <class E, int D>
__device__ __forceinline__ void add_dot(float (&dot)[2], Rows<D>& rows, Rows<D>& others) {
#pragma unroll
  for (int block = 0; block < D / 8; ++block) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 x = pair<E>(rows.at(block, i)), y = pair<E>(others.at(block, i));
      dot[i] += x.x * y.x + x.y * y.y;
    }
  }
}

// The same with numbers that all rows share, a part of the time token that starts at `first`.
template <class E, int D>
__device__ __forceinline__ void add_time_dot(float (&dot)[2], Rows<D>& rows, const Input& temb,
                                             int64_t first) {
  float2 time[D / 8];
  load_time(time, temb, first);
#pragma unroll
  for (int block = 0; block < D / 8; ++block) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 x = pair<E>(rows.at(block, i));
      dot[i] += x.x * time[block].x + x.y * time[block].y;
    }
  }
}

// This warp's 16 rows of dq and of dO, summed by column: to `sums` (2, D), the time token's share.
template <class E, int D>
__device__ __forceinline__ void sum_for_time(float* sums, const float (&dq)[D / 8][4],
                                             Rows<D>& douts) {
#pragma unroll
  for (int block = 0; block < D / 8; ++block) {
    const float2 upper = pair<E>(douts.at(block, 0)), lower = pair<E>(douts.at(block, 1));
    float x[4] = {dq[block][0] + dq[block][2], dq[block][1] + dq[block][3], upper.x + lower.x,
                  upper.y + lower.y};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) x[i] += __shfl_xor_sync(0xffffffffu, x[i], step);
    }
    if (threadIdx.x % 32 < 4) {
      float* to = sums + 8 * block + threadIdx.x % 4 * 2;
      *reinterpret_cast<float2*>(to) = make_float2(x[0], x[1]);
      *reinterpret_cast<float2*>(to + D) = make_float2(x[2], x[3]);
    }
  }
}

// The sums of `warps` warps from the first, to dq_t and dv_t of one head: `to` is its dq_t.
template <int D>
__device__ __forceinline__ void write_time(float* to, int channels, const float* sums, int warps,
                                           int thread, int threads) {
  for (int i = thread; i < 2 * D; i += threads) {
    float sum = 0;
    for (int warp = 0; warp < warps; ++warp) sum += sums[warp * 2 * D + i];
    to[i < D ? i : channels + i - D] = sum;
  }
}

// Adds dS of this warp's 16 queries and 8 N keys to rows from first_row on of `tile`, whose rows
// are `pitch` long. Each number is always the same thread's.
template <int N>
__device__ __forceinline__ void add_pairs(float* tile, int pitch, int first_row,
                                          const float (&dscores)[N][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      auto* to = reinterpret_cast<float2*>(tile + (first_row + lane / 4 + 8 * i) * pitch + 8 * n +
                                           lane % 4 * 2);
      *to = make_float2(to->x + dscores[n][2 * i], to->y + dscores[n][2 * i + 1]);
    }
  }
}

// Sums the 64 rows of such a tile by offset: row r has query (r % period) of its window, counted
// from the query tile's first, and the keys are `keys` from the key tile's first. All threads,
// after a barrier.
__device__ __forceinline__ void sum_offsets(float* to, const float* tile, int pitch, int period,
                                            int keys, int query_tile, int key_tile,
                                            const Windows& windows) {
  const int w = windows.width, across = 2 * w - 1;
  const int first = first_difference(windows, query_tile, key_tile);
  for (int offset = threadIdx.x; offset < pair_offsets(windows); offset += kThreads) {
    const int dy = first + offset / across, dx = offset % across - (w - 1);
    float sum = 0;
    for (int row = 0; row < 64; ++row) {
      const int query = query_tile * 64 + row % period;
      const int y = query / w - dy, x = query % w - dx, key = y * w + x - key_tile * 64;
      const bool inside = query < windows.tokens && y >= 0 && x >= 0 && x < w && key >= 0 &&
                          key < keys && y < windows.height;
      if (inside) sum += tile[row * pitch + key];
    }
    to[offset] = sum;
  }
}

}  // namespace diffit::cuda
