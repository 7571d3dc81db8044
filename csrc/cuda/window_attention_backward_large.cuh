// The backward of windows of several tiles: dq by tiles of queries, dk and dv by tiles of keys, and
// dtable by pairs of tiles. The first also writes delta = dO (out - v_t) for the others.
#pragma once

#include "cuda/window_attention_backward.cuh"

namespace diffit::cuda {

// Eights of the other tile's tokens that a warp holds scores of at a time: as registers allow.
constexpr int query_step(int head_dim) { return head_dim <= 72 ? 8 : 4; }
constexpr int key_step(int head_dim) { return head_dim <= 64 ? 8 : 4; }
// Whether keys and values stay in registers. Else each step loads them from shared memory, and the
// next item's can only be copied when the last step is over.
constexpr bool keeps_keys(int head_dim) { return head_dim <= 96; }

template <int D>
constexpr int query_shared(const Windows& windows, int stages) {
  return Kept::bytes(windows) + 4 * 4 * 2 * D + (3 + 2 * stages) * Tile<D>::bytes(64);
}

template <class E, int D>
__global__ void __launch_bounds__(kThreads, 1)
    window_attention_backward_query_kernel(const __grid_constant__ BackwardArguments arguments) {
  constexpr int N = query_step(D), kTileBytes = Tile<D>::bytes(64);
  const WindowAttention& a = arguments.a;
  const Windows& windows = arguments.windows;
  const Walk& walk = arguments.walk;
  const int head = blockIdx.x / walk.splits;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32;
  const int first_row = 16 * warp, tiles = window_tiles(windows);
  const bool has_time = a.temb.data;
  const int channels = a.channels();

  unsigned char* memory = shared_memory();
  const Kept kept(memory, windows);
  memory += Kept::bytes(windows);
  float* const time_sums = reinterpret_cast<float*>(memory);  // (4 warps, 2, D)
  unsigned char* const q_tile = memory + 4 * 4 * 2 * D;
  unsigned char* const dout_tile = q_tile + kTileBytes;
  unsigned char* const out_tile = dout_tile + kTileBytes;
  unsigned char* const k_tiles = out_tile + kTileBytes;
  unsigned char* const v_tiles = k_tiles + walk.stages * kTileBytes;
  fill(kept, windows, a.table, head, a.heads);
  __syncthreads();

  const Head<E> from(a, head);
  const auto copy = [&](int item, int key_tile, int stage) {
    const int64_t start = windows.start(item / tiles);
    const auto row_of = [&](int token) -> int64_t {
      return token < windows.tokens ? start + kept.offsets[token] : -1;
    };
    if (key_tile == 0) {
      const auto query_of = [&](int row) { return row_of(item % tiles * 64 + row); };
      copy_rows<E, D, 64, kThreads, 1>({q_tile}, {from.q}, 3 * channels, query_of);
      copy_rows<E, D, 64, kThreads, 2>({dout_tile, out_tile}, {from.dout, from.out}, channels,
                                       query_of);
    }
    copy_rows<E, D, 64, kThreads, 2>({k_tiles + stage * kTileBytes, v_tiles + stage * kTileBytes},
                                     {from.k, from.v}, 3 * channels,
                                     [&](int row) { return row_of(key_tile * 64 + row); });
    commit_copies();
  };

  const float scale = a.scale * kLog2e;
  int stage = 0, item = blockIdx.x % walk.splits;
  if (item < walk.items) copy(item, 0, 0);
  for (; item < walk.items; item += walk.splits) {
    const int window = item / tiles;
    const int64_t time_at = int64_t{windows.sample(window)} * 2 * channels + head * D;
    int tokens[2];
    const char* biases[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      tokens[i] = item % tiles * 64 + first_row + g + 8 * i;
      biases[i] = kept.of_query(windows, tokens[i]);
    }
    Rows<D> queries[1], douts[1];
    float acc[1][D / 8][4] = {}, lse[2], delta[2] = {};
    for (int key_tile = 0; key_tile < tiles; ++key_tile) {
      wait_copies<0>();
      __syncthreads();
      const bool last = key_tile + 1 == tiles;
      const int next_item = last ? item + walk.splits : item, next_tile = last ? 0 : key_tile + 1;
      if (walk.stages == 2 && next_item < walk.items) copy(next_item, next_tile, stage ^ 1);
      if (key_tile == 0) {
        load_rows(queries[0], q_tile, first_row);
        load_rows(douts[0], dout_tile, first_row);
        Rows<D> outs;
        load_rows(outs, out_tile, first_row);
        add_dot<E>(delta, douts[0], outs);
        if (has_time) {
          add_time<E>(queries[0], a.temb, time_at);
          float of_time[2] = {};
          add_time_dot<E>(of_time, douts[0], a.temb, time_at + channels);
          delta[0] -= of_time[0], delta[1] -= of_time[1];
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          delta[i] = row_sum(delta[i]);
          const int64_t at = (int64_t{window} * a.heads + head) * windows.tokens + tokens[i];
          lse[i] = tokens[i] < windows.tokens ? a.lse[at] : INFINITY;
          if (tokens[i] < windows.tokens && t == 0) arguments.delta[at] = delta[i];
        }
      }
      const unsigned char* const k_tile = k_tiles + stage * kTileBytes;
      const unsigned char* const v_tile = v_tiles + stage * kTileBytes;
#pragma unroll 1
      for (int step = 0; step < 64; step += 8 * N) {
        float scores[1][N][4] = {}, dscores[1][N][4] = {};
        multiply_transposed<E>(scores, queries, k_tile, step);
        multiply_transposed<E>(dscores, douts, v_tile, step);
        const bool masked = key_tile * 64 + step + 8 * N > windows.tokens;
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const int key = key_tile * 64 + step + 8 * n + 2 * t;
          const int2 place = *reinterpret_cast<const int2*>(kept.places + key);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float bias = Kept::bias(biases[i / 2], i % 2 ? -place.y : -place.x);
            float p = exp2_approx(fmaf(scores[0][n][i], scale, bias) - lse[i / 2]);
            if (masked && key + i % 2 >= windows.tokens) p = 0;
            dscores[0][n][i] = p * (dscores[0][n][i] - delta[i / 2]);
          }
        }
        uint32_t rounded[1][N / 2][4];
        to_rows<E>(rounded[0], dscores[0]);
        multiply<E, D>(acc, rounded, k_tile, step);
      }
      if (walk.stages == 2) {
        stage ^= 1;
      } else {
        __syncthreads();
        if (next_item < walk.items) copy(next_item, next_tile, 0);
      }
    }

    scale_sums(acc[0], a.scale);
    E* rows[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t row = windows.start(window) + kept.offsets[tokens[i]];
      rows[i] = tokens[i] < windows.tokens ? static_cast<E*>(a.dqkv) + row * 3 * channels + head * D
                                           : nullptr;
    }
    store_rows(acc[0], rows[0], rows[1]);
    if (has_time) {
      sum_for_time<E, D>(time_sums + warp * 2 * D, acc[0], douts[0]);
      __syncthreads();
      write_time<D>(arguments.dtemb_parts + int64_t{item} * 2 * channels + head * D, channels,
                    time_sums, 4, threadIdx.x, kThreads);
    }
  }
}

template <int D>
constexpr int key_shared(const Windows& windows, int stages) {
  return Kept::bytes(windows) + stages * 2 * 64 * 4 + 2 * (1 + stages) * Tile<D>::bytes(64);
}

template <class E, int D>
__global__ void __launch_bounds__(kThreads, 1)
    window_attention_backward_key_kernel(const __grid_constant__ BackwardArguments arguments) {
  constexpr int N = key_step(D), kTileBytes = Tile<D>::bytes(64);
  const WindowAttention& a = arguments.a;
  const Windows& windows = arguments.windows;
  const Walk& walk = arguments.walk;
  const int head = blockIdx.x / walk.splits;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first_row = threadIdx.x / 32 * 16, tiles = window_tiles(windows);
  const bool has_time = a.temb.data;
  const int channels = a.channels();

  unsigned char* memory = shared_memory();
  const Kept kept(memory, windows);
  memory += Kept::bytes(windows);
  float* const statistics = reinterpret_cast<float*>(memory);  // (stages, lse and delta, 64)
  unsigned char* const k_tile = memory + walk.stages * 2 * 64 * 4;
  unsigned char* const v_tile = k_tile + kTileBytes;
  unsigned char* const q_tiles = v_tile + kTileBytes;
  unsigned char* const dout_tiles = q_tiles + walk.stages * kTileBytes;
  fill(kept, windows, a.table, head, a.heads);
  __syncthreads();

  const Head<E> from(a, head);
  const auto copy = [&](int item, int query_tile, int stage) {
    const int window = item / tiles;
    const int64_t start = windows.start(window);
    const auto row_of = [&](int token) -> int64_t {
      return token < windows.tokens ? start + kept.offsets[token] : -1;
    };
    if (query_tile == 0) {
      copy_rows<E, D, 64, kThreads, 2>({k_tile, v_tile}, {from.k, from.v}, 3 * channels,
                                       [&](int row) { return row_of(item % tiles * 64 + row); });
    }
    const auto query_of = [&](int row) { return row_of(query_tile * 64 + row); };
    copy_rows<E, D, 64, kThreads, 1>({q_tiles + stage * kTileBytes}, {from.q}, 3 * channels,
                                     query_of);
    copy_rows<E, D, 64, kThreads, 1>({dout_tiles + stage * kTileBytes}, {from.dout}, channels,
                                     query_of);
    const int token = query_tile * 64 + threadIdx.x % 64;
    const bool valid = token < windows.tokens;
    const float* of_row = threadIdx.x < 64 ? a.lse : arguments.delta;
    of_row += (int64_t{window} * a.heads + head) * windows.tokens + (valid ? token : 0);
    copy_async_4(statistics + stage * 128 + threadIdx.x, of_row, valid);
    commit_copies();
  };

  const float scale = a.scale * kLog2e;
  int stage = 0, item = blockIdx.x % walk.splits;
  if (item < walk.items) copy(item, 0, 0);
  for (; item < walk.items; item += walk.splits) {
    const int window = item / tiles;
    const int64_t time_at = int64_t{windows.sample(window)} * 2 * channels + head * D;
    int tokens[2];
    const char* biases[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      tokens[i] = item % tiles * 64 + first_row + g + 8 * i;
      biases[i] = kept.of_key(windows, tokens[i]);
    }
    Rows<D> keys[1], values[1];
    // The time token's share: of each key's scores, and of its gradient.
    float time_score[2] = {}, sum[2] = {};
    float dkeys[1][D / 8][4] = {}, dvalues[1][D / 8][4] = {};
    for (int query_tile = 0; query_tile < tiles; ++query_tile) {
      wait_copies<0>();
      __syncthreads();
      const bool last = query_tile + 1 == tiles;
      const int next_item = last ? item + walk.splits : item, next_tile = last ? 0 : query_tile + 1;
      if (walk.stages == 2 && next_item < walk.items) copy(next_item, next_tile, stage ^ 1);
      if (query_tile == 0) {
        load_rows(keys[0], k_tile, first_row);
        if constexpr (keeps_keys(D)) load_rows(values[0], v_tile, first_row);
        if (has_time) {
          add_time_dot<E>(time_score, keys[0], a.temb, time_at);
#pragma unroll
          for (int i = 0; i < 2; ++i) time_score[i] = row_sum(time_score[i]) * scale;
        }
      }
      const unsigned char* const q_tile = q_tiles + stage * kTileBytes;
      const unsigned char* const dout_tile = dout_tiles + stage * kTileBytes;
      const float* const lse = statistics + stage * 128;
#pragma unroll 1
      for (int step = 0; step < 64; step += 8 * N) {
        float scores[1][N][4] = {}, dscores[1][N][4] = {};
        if constexpr (!keeps_keys(D)) load_rows(keys[0], k_tile, first_row);
        multiply_transposed<E>(scores, keys, q_tile, step);
        if constexpr (!keeps_keys(D)) load_rows(values[0], v_tile, first_row);
        multiply_transposed<E>(dscores, values, dout_tile, step);
        const bool masked = query_tile * 64 + step + 8 * N > windows.tokens;
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const int column = step + 8 * n + 2 * t, query = query_tile * 64 + column;
          const int2 place = *reinterpret_cast<const int2*>(kept.places + query);
          const float2 column_lse = *reinterpret_cast<const float2*>(lse + column);
          const float2 column_delta = *reinterpret_cast<const float2*>(lse + 64 + column);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float bias = Kept::bias(biases[i / 2], i % 2 ? place.y : place.x);
            const float score = fmaf(scores[0][n][i], scale, bias) + time_score[i / 2];
            float p = exp2_approx(score - (i % 2 ? column_lse.y : column_lse.x));
            if (masked && query + i % 2 >= windows.tokens) p = 0;
            scores[0][n][i] = p;
            dscores[0][n][i] = p * (dscores[0][n][i] - (i % 2 ? column_delta.y : column_delta.x));
            sum[i / 2] += dscores[0][n][i];
          }
        }
        uint32_t rounded[1][N / 2][4];
        to_rows<E>(rounded[0], scores[0]);
        multiply<E, D>(dvalues, rounded, dout_tile, step);
        to_rows<E>(rounded[0], dscores[0]);
        multiply<E, D>(dkeys, rounded, q_tile, step);
      }
      if (walk.stages == 2) {
        stage ^= 1;
      } else {
        __syncthreads();
        if (next_item < walk.items) copy(next_item, next_tile, 0);
      }
    }

    E* rows[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] = row_sum(sum[i]);
      const int64_t row = windows.start(window) + kept.offsets[tokens[i]];
      rows[i] = tokens[i] < windows.tokens
                    ? static_cast<E*>(a.dqkv) + row * 3 * channels + channels + head * D
                    : nullptr;
    }
    float2 time[D / 8] = {};
    if (has_time) load_time(time, a.temb, time_at);
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float of_time = sum[i / 2] * (i % 2 ? time[n].y : time[n].x);
        dkeys[0][n][i] = a.scale * (dkeys[0][n][i] + of_time);
      }
    }
    store_rows(dkeys[0], rows[0], rows[1]);
    store_rows(dvalues[0], rows[0] ? rows[0] + channels : nullptr,
               rows[1] ? rows[1] + channels : nullptr);
  }
}

}  // namespace diffit::cuda
