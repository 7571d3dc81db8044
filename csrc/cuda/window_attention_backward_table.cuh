// dtable of windows of several tiles: dS of one pair of tiles, summed in registers over windows,
// and then by offset. Windows are cut into splits by sizes alone.
#pragma once

#include "cuda/window_attention_backward.cuh"

namespace diffit::cuda {

constexpr int kTablePitch = 72;

template <int D>
constexpr int table_shared(const Windows& windows, int stages) {
  static_assert(4 * Tile<D>::bytes(64) >= 64 * kTablePitch * 4, "dS takes the tiles' room");
  return Kept::bytes(windows) + stages * 4 * Tile<D>::bytes(64);
}

template <class E, int D>
__global__ void __launch_bounds__(kThreads, 1)
    window_attention_backward_table_kernel(const __grid_constant__ BackwardArguments arguments) {
  constexpr int N = 8, kTileBytes = Tile<D>::bytes(64);
  const WindowAttention& a = arguments.a;
  const Windows& windows = arguments.windows;
  const Walk& walk = arguments.walk;  // over windows, for each pair of tiles
  const int tiles = window_tiles(windows);
  const int key_tile = blockIdx.x % tiles, query_tile = blockIdx.x / tiles % tiles;
  const int head = blockIdx.x / (tiles * tiles) % a.heads;
  const int split = blockIdx.x / (tiles * tiles) / a.heads;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first_row = threadIdx.x / 32 * 16;
  const int channels = a.channels();

  unsigned char* memory = shared_memory();
  const Kept kept(memory, windows);
  unsigned char* const tiles_memory = memory + Kept::bytes(windows);
  fill(kept, windows, a.table, head, a.heads);
  __syncthreads();

  const Head<E> from(a, head);
  const auto copy = [&](int window, int stage) {
    unsigned char* const to = tiles_memory + stage * 4 * kTileBytes;
    const int64_t start = windows.start(window);
    const auto row_of = [&](int token) -> int64_t {
      return token < windows.tokens ? start + kept.offsets[token] : -1;
    };
    const auto query_of = [&](int row) { return row_of(query_tile * 64 + row); };
    copy_rows<E, D, 64, kThreads, 1>({to}, {from.q}, 3 * channels, query_of);
    copy_rows<E, D, 64, kThreads, 1>({to + kTileBytes}, {from.dout}, channels, query_of);
    copy_rows<E, D, 64, kThreads, 2>({to + 2 * kTileBytes, to + 3 * kTileBytes}, {from.k, from.v},
                                     3 * channels,
                                     [&](int row) { return row_of(key_tile * 64 + row); });
    commit_copies();
  };

  const float scale = a.scale * kLog2e;
  const bool masked = key_tile * 64 + 64 > windows.tokens;
  int tokens[2];
  const char* biases[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    tokens[i] = query_tile * 64 + first_row + g + 8 * i;
    biases[i] = kept.of_query(windows, tokens[i]);
  }
  float pairs[N][4] = {};
  int stage = 0, window = split;
  if (window < windows.count) copy(window, 0);
  for (; window < windows.count; window += walk.splits) {
    wait_copies<0>();
    __syncthreads();
    const int next = window + walk.splits;
    if (walk.stages == 2 && next < windows.count) copy(next, stage ^ 1);
    const unsigned char* const q_tile = tiles_memory + stage * 4 * kTileBytes;
    float lse[2], delta[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t at = (int64_t{window} * a.heads + head) * windows.tokens + tokens[i];
      lse[i] = tokens[i] < windows.tokens ? a.lse[at] : INFINITY;
      delta[i] = tokens[i] < windows.tokens ? arguments.delta[at] : 0.f;
    }
    float scores[1][N][4] = {}, dscores[1][N][4] = {};
    {
      Rows<D> rows[1];
      load_rows(rows[0], q_tile, first_row);
      if (a.temb.data) {
        add_time<E>(rows[0], a.temb, int64_t{windows.sample(window)} * 2 * channels + head * D);
      }
      multiply_transposed<E>(scores, rows, q_tile + 2 * kTileBytes, 0);
      load_rows(rows[0], q_tile + kTileBytes, first_row);
      multiply_transposed<E>(dscores, rows, q_tile + 3 * kTileBytes, 0);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int key = key_tile * 64 + 8 * n + 2 * t;
      const int2 place = *reinterpret_cast<const int2*>(kept.places + key);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float bias = Kept::bias(biases[i / 2], i % 2 ? -place.y : -place.x);
        float p = exp2_approx(fmaf(scores[0][n][i], scale, bias) - lse[i / 2]);
        if (masked && key + i % 2 >= windows.tokens) p = 0;
        pairs[n][i] += p * (dscores[0][n][i] - delta[i / 2]);
      }
    }
    if (walk.stages == 2) {
      stage ^= 1;
    } else {
      __syncthreads();
      if (next < windows.count) copy(next, 0);
    }
  }

  __syncthreads();
  float* const tile = reinterpret_cast<float*>(tiles_memory);
  for (int i = threadIdx.x; i < 64 * kTablePitch; i += kThreads) tile[i] = 0;
  __syncthreads();
  add_pairs(tile, kTablePitch, first_row, pairs);
  __syncthreads();
  sum_offsets(arguments.dtable_parts + int64_t{blockIdx.x} * pair_offsets(windows), tile,
              kTablePitch, 64, 64, query_tile, key_tile, windows);
}

}  // namespace diffit::cuda
