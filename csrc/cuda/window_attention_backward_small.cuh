// The backward of windows of up to 64 tokens: everything from one tile, which is read once. Each
// warp takes 16 queries, for dq, and then 16 keys, for dk and dv. Four windows of up to 16 tokens,
// or two of up to 32, share a tile, and no warp looks beyond its own window. dS is summed in shared
// memory, each pair by the thread that has it, over all tiles that a block of threads walks over.
#pragma once

#include "cuda/window_attention_backward.cuh"

namespace diffit::cuda {

// Of a row of dS: 8 numbers more than there are keys, so that a warp's threads use all banks.
template <int KEYS>
constexpr int kPairsPitch = KEYS + 8;

template <int D, int KEYS>
constexpr int small_backward_shared(const Windows& windows, int stages) {
  return Kept::bytes(windows) + 4 * (64 * kPairsPitch<KEYS> + 2 * 64 + 4 * 2 * D) +
         stages * 4 * Tile<D>::bytes(64);
}

template <class E, int D, int KEYS>
__global__ void __launch_bounds__(kThreads, 1)
    window_attention_backward_small_kernel(const __grid_constant__ BackwardArguments arguments) {
  constexpr int kWindows = 64 / KEYS, N = KEYS / 8, kTileBytes = Tile<D>::bytes(64);
  const WindowAttention& a = arguments.a;
  const Windows& windows = arguments.windows;
  const Walk& walk = arguments.walk;
  const int head = blockIdx.x / walk.splits, split = blockIdx.x % walk.splits;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
  const int first_row = 16 * warp, first_other = first_row / KEYS * KEYS;
  const bool has_time = a.temb.data;
  const int channels = a.channels();

  unsigned char* memory = shared_memory();
  const Kept kept(memory, windows);
  memory += Kept::bytes(windows);
  float* const pairs = reinterpret_cast<float*>(memory);  // dS (64, KEYS)
  float* const lse = pairs + 64 * kPairsPitch<KEYS>;
  float* const delta = lse + 64;
  float* const time_sums = delta + 64;  // (4 warps, 2, D)
  unsigned char* const tiles = reinterpret_cast<unsigned char*>(time_sums + 4 * 2 * D);
  for (int i = threadIdx.x; i < 64 * kPairsPitch<KEYS>; i += kThreads) pairs[i] = 0;
  fill(kept, windows, a.table, head, a.heads);
  __syncthreads();

  const Head<E> from(a, head);
  const auto copy = [&](int item, int stage) {
    unsigned char* const to = tiles + stage * 4 * kTileBytes;
    const auto row_of = [&](int row) -> int64_t {
      const int token = row % KEYS, window = item * kWindows + row / KEYS;
      if (token >= windows.tokens || window >= windows.count) return -1;
      return windows.start(window) + kept.offsets[token];
    };
    copy_rows<E, D, 64, kThreads, 3>({to, to + kTileBytes, to + 2 * kTileBytes},
                                     {from.q, from.k, from.v}, 3 * channels, row_of);
    copy_rows<E, D, 64, kThreads, 1>({to + 3 * kTileBytes}, {from.dout}, channels, row_of);
    commit_copies();
  };

  // Rows g and g + 8 of this warp: tokens, as queries and as keys; columns are tokens of the
  // window.
  int tokens[2];
  const char *of_query[2], *of_key[2];  // biases
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    tokens[i] = (first_row + g + 8 * i) % KEYS;
    of_query[i] = kept.of_query(windows, tokens[i]);
    of_key[i] = kept.of_key(windows, tokens[i]);
  }
  const bool masked = KEYS > windows.tokens;
  const float scale = a.scale * kLog2e;
  int stage = 0;
  if (split < walk.items) copy(split, 0);
  for (int item = split; item < walk.items; item += walk.splits) {
    wait_copies<0>();
    __syncthreads();
    if (walk.stages == 2 && item + walk.splits < walk.items) copy(item + walk.splits, stage ^ 1);
    unsigned char* const q_tile = tiles + stage * 4 * kTileBytes;
    unsigned char* const k_tile = q_tile + kTileBytes;
    unsigned char* const v_tile = k_tile + kTileBytes;
    unsigned char* const dout_tile = v_tile + kTileBytes;
    const int window = item * kWindows + first_row / KEYS;
    const bool valid_window = window < windows.count;
    const int64_t start = valid_window ? windows.start(window) : 0;
    E* dq[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool valid = valid_window && tokens[i] < windows.tokens;
      dq[i] = valid ? static_cast<E*>(a.dqkv) + (start + kept.offsets[tokens[i]]) * 3 * channels +
                          head * D
                    : nullptr;
    }

    {  // this warp's rows are queries
      float scores[1][N][4] = {}, dscores[1][N][4] = {};
      Rows<D> rows[1];
      load_rows(rows[0], q_tile, first_row);
      if (has_time && valid_window) {
        add_time<E>(rows[0], a.temb, int64_t{windows.sample(window)} * 2 * channels + head * D);
        __syncwarp();
#pragma unroll
        for (int block = 0; block < D / 8; ++block) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            unsigned char* to = q_tile + (first_row + g + 8 * i) * Tile<D>::kRow + 16 * block;
            *reinterpret_cast<uint32_t*>(to + 4 * t) = rows[0].at(block, i);
          }
        }
      }
      multiply_transposed<E>(scores, rows, k_tile, first_other);
      load_rows(rows[0], dout_tile, first_row);
      multiply_transposed<E>(dscores, rows, v_tile, first_other);
      float row_lse[2];  // infinite where there is no query: then P is zero
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t at = (int64_t{window} * a.heads + head) * windows.tokens + tokens[i];
        row_lse[i] = dq[i] ? a.lse[at] : INFINITY;
      }
      float row_delta[2] = {};
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const int key = 8 * n + 2 * t;
        const int2 place = *reinterpret_cast<const int2*>(kept.places + key);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float bias = Kept::bias(of_query[i / 2], i % 2 ? -place.y : -place.x);
          const float p = exp2_approx(fmaf(scores[0][n][i], scale, bias) - row_lse[i / 2]);
          scores[0][n][i] = masked && key + i % 2 >= windows.tokens ? 0.f : p;
          row_delta[i / 2] += scores[0][n][i] * dscores[0][n][i];
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        row_delta[i] = row_sum(row_delta[i]);
        if (t == 0) {
          lse[first_row + g + 8 * i] = row_lse[i];
          delta[first_row + g + 8 * i] = row_delta[i];
        }
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          dscores[0][n][i] = scores[0][n][i] * (dscores[0][n][i] - row_delta[i / 2]);
        }
      }
      if (a.table.data) add_pairs(pairs, kPairsPitch<KEYS>, first_row, dscores[0]);
      uint32_t rounded[1][N / 2][4];
      to_rows<E>(rounded[0], dscores[0]);
      float acc[1][D / 8][4] = {};
      multiply<E, D>(acc, rounded, k_tile, first_other);
      scale_sums(acc[0], a.scale);
      store_rows(acc[0], dq[0], dq[1]);
      if (has_time) {
        load_rows(rows[0], dout_tile, first_row);  // again: registers are short in between
        sum_for_time<E, D>(time_sums + warp * 2 * D, acc[0], rows[0]);
      }
    }
    __syncthreads();  // the time token is in all queries, and lse and delta are there
    if (has_time && warp * 16 % KEYS == 0 && valid_window) {
      write_time<D>(arguments.dtemb_parts + int64_t{window} * 2 * channels + head * D, channels,
                    time_sums + warp * 2 * D, KEYS / 16, lane, 32);
    }
    {  // this warp's rows are keys
      float scores[1][N][4] = {}, dscores[1][N][4] = {};
      {
        Rows<D> keys[1], values[1];
        load_rows(keys[0], k_tile, first_row);
        multiply_transposed<E>(scores, keys, q_tile, first_other);
        load_rows(values[0], v_tile, first_row);
        multiply_transposed<E>(dscores, values, dout_tile, first_other);
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const int query = 8 * n + 2 * t;
        const int2 place = *reinterpret_cast<const int2*>(kept.places + query);
        const float2 column_lse = *reinterpret_cast<const float2*>(lse + first_other + query);
        const float2 column_delta = *reinterpret_cast<const float2*>(delta + first_other + query);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float bias = Kept::bias(of_key[i / 2], i % 2 ? place.y : place.x);
          const float p = exp2_approx(fmaf(scores[0][n][i], scale, bias) -
                                      (i % 2 ? column_lse.y : column_lse.x));
          scores[0][n][i] = p;
          dscores[0][n][i] = p * (dscores[0][n][i] - (i % 2 ? column_delta.y : column_delta.x));
        }
      }
      uint32_t rounded[1][N / 2][4];
      to_rows<E>(rounded[0], scores[0]);
      float acc[1][D / 8][4] = {};
      multiply<E, D>(acc, rounded, dout_tile, first_other);
      store_rows(acc[0], dq[0] ? dq[0] + 2 * channels : nullptr,
                 dq[1] ? dq[1] + 2 * channels : nullptr);
      to_rows<E>(rounded[0], dscores[0]);
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[0][n][i] = 0;
      }
      multiply<E, D>(acc, rounded, q_tile, first_other);
      scale_sums(acc[0], a.scale);
      store_rows(acc[0], dq[0] ? dq[0] + channels : nullptr, dq[1] ? dq[1] + channels : nullptr);
    }
    if (walk.stages == 2) {
      stage ^= 1;
    } else {
      __syncthreads();
      if (item + walk.splits < walk.items) copy(item + walk.splits, 0);
    }
  }

  if (!a.table.data) return;
  __syncthreads();
  sum_offsets(arguments.dtable_parts + (int64_t{split} * a.heads + head) * pair_offsets(windows),
              pairs, kPairsPitch<KEYS>, KEYS, KEYS, 0, 0, windows);
}

}  // namespace diffit::cuda
