// Windowed attention with a bias from its table and a time token, on tensor cores from sm_80 on:
//
//     out = softmax(scale (q + q_t) kᵀ + B) v + v_t
//
// A block of four warps serves one head, and walks over tiles of queries of all windows, so that
// what belongs to a head is made ready once. A tile has 64 M queries: of one window, or, of windows
// of up to 32 tokens, several windows, each at a multiple of KEYS rows. Its keys pass in tiles of
// 64, the next one copied while one is worked on. A warp keeps 16 M queries, their scores and their
// sums in registers: a row of the scores lies in four lanes.
//
// Read and written once: qkv (k and v by every tile of queries of a window, from the L2 cache),
// out, lse. The exponentials are of base 2: log2 e is part of the scale and of the biases.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/tile.cuh"
#include "cuda/window.cuh"

namespace diffit::cuda {

constexpr int kThreads = 128;
constexpr int kTileKeys = 64;

// Of all kernels over tiles: which tiles a block of threads takes, and how far it copies ahead.
struct Walk {
  int items;   // tiles of a head
  int splits;  // blocks of threads of a head; each takes every splits-th item
  int stages;  // 2: the next tile is copied meanwhile; 1: where shared memory has no room for it
};

// Where a head's numbers of token 0 lie: rows are 3C long in qkv, C in the others.
template <class E>
struct Head {
  const E *q, *k, *v, *out, *dout;

  __device__ __forceinline__ Head(const WindowAttention& a, int head)
      : q(static_cast<const E*>(a.qkv) + head * a.head_dim),
        k(q + a.channels()),
        v(k + a.channels()),
        out(static_cast<const E*>(a.out) + head * a.head_dim),
        dout(static_cast<const E*>(a.grad_out) + head * a.head_dim) {}
};

struct ForwardArguments {
  WindowAttention a;
  Windows windows;
  Walk walk;
};

// Adds the time token's q part, which starts at `first`, to rows of queries: in float32, rounded
// once.
template <class E, int D>
__device__ __forceinline__ void add_time(Rows<D>& rows, const Input& temb, int64_t first) {
  float2 time[D / 8];
  load_time(time, temb, first);
#pragma unroll
  for (int block = 0; block < D / 8; ++block) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 x = pair<E>(rows.at(block, i));
      rows.at(block, i) = pack<E>(x.x + time[block].x, x.y + time[block].y);
    }
  }
}

template <int D, int M>
constexpr int forward_shared(const Windows& windows, int stages) {
  const bool one_step = windows.tokens <= kTileKeys;
  return stages * (Tile<D>::bytes(kTileKeys) * 2 + (one_step ? Tile<D>::bytes(64 * M) : 0)) +
         (one_step ? 0 : Tile<D>::bytes(64 * M)) + Kept::bytes(windows);
}

template <class E, int D, int M, int KEYS>
__global__ void __launch_bounds__(kThreads, 1)
    window_attention_forward_kernel(const __grid_constant__ ForwardArguments arguments) {
  constexpr int kQueries = 64 * M, kWindows = kTileKeys / KEYS;
  constexpr int N = M > 1 ? 4 : KEYS / 8;  // eights of keys of a step
  static_assert(M == 1 || kWindows == 1);
  const WindowAttention& a = arguments.a;
  const Windows& windows = arguments.windows;
  const Walk& walk = arguments.walk;
  const int head = blockIdx.x / walk.splits;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first_row = threadIdx.x / 32 * 16 * M;  // of this warp
  const int first_key = kWindows > 1 ? first_row / KEYS * KEYS : 0;
  const int query_tiles = kWindows > 1 ? 1 : (windows.tokens + kQueries - 1) / kQueries;
  const int key_tiles = kWindows > 1 ? 1 : (windows.tokens + kTileKeys - 1) / kTileKeys;
  const bool has_time = a.temb.data;
  const int channels = a.channels();

  unsigned char* memory = shared_memory();
  const Kept kept(memory, windows);
  memory += Kept::bytes(windows);
  // Queries of two items where each is a single step: the next ones come before these are done.
  const int query_buffers = key_tiles == 1 ? walk.stages : 1;
  unsigned char* const q_tiles = memory;
  unsigned char* const k_tiles = q_tiles + query_buffers * Tile<D>::bytes(kQueries);
  unsigned char* const v_tiles = k_tiles + walk.stages * Tile<D>::bytes(kTileKeys);
  fill(kept, windows, a.table, head, a.heads);
  __syncthreads();

  const Head<E> from(a, head);
  const auto copy = [&](int item, int key_tile, int buffer, int stage) {
    const int window = item / query_tiles * kWindows;
    const int64_t start = kWindows > 1 ? 0 : windows.start(window);
    const auto row_of = [&](int row, int first_token) -> int64_t {
      const int token = kWindows > 1 ? row % KEYS : first_token + row;
      const int of = window + (kWindows > 1 ? row / KEYS : 0);
      if (token >= windows.tokens || of >= windows.count) return -1;
      return (kWindows > 1 ? windows.start(of) : start) + kept.offsets[token];
    };
    unsigned char* const q_tile = q_tiles + buffer * Tile<D>::bytes(kQueries);
    unsigned char* const k_tile = k_tiles + stage * Tile<D>::bytes(kTileKeys);
    unsigned char* const v_tile = v_tiles + stage * Tile<D>::bytes(kTileKeys);
    if constexpr (kWindows > 1) {
      copy_rows<E, D, 64, kThreads, 3>({q_tile, k_tile, v_tile}, {from.q, from.k, from.v},
                                       3 * channels, [&](int row) { return row_of(row, 0); });
    } else {
      if (key_tile == 0) {
        const int first = item % query_tiles * kQueries;
        copy_rows<E, D, kQueries, kThreads, 1>({q_tile}, {from.q}, 3 * channels,
                                               [&](int row) { return row_of(row, first); });
      }
      copy_rows<E, D, kTileKeys, kThreads, 2>(
          {k_tile, v_tile}, {from.k, from.v}, 3 * channels,
          [&](int row) { return row_of(row, key_tile * kTileKeys); });
    }
    commit_copies();
  };

  const float scale = a.scale * kLog2e;
  int buffer = 0, stage = 0, item = blockIdx.x % walk.splits;
  if (item < walk.items) copy(item, 0, 0, 0);
  for (; item < walk.items; item += walk.splits) {
    // Rows g + 8 i of this warp's m-th sixteen: a window, and tokens of it.
    const int window = item / query_tiles * kWindows + (kWindows > 1 ? first_row / KEYS : 0);
    const int64_t time_at = int64_t{windows.sample(window)} * 2 * channels + head * D;
    int token[M][2];
    const char* biases[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first_row + 16 * m + g + 8 * i;
        token[m][i] = kWindows > 1 ? row % KEYS : item % query_tiles * kQueries + row;
        biases[m][i] = kept.of_query(windows, token[m][i]);
      }
    }
    Rows<D> queries[M];
    float acc[M][D / 8][4] = {}, maximum[M][2], sum[M][2] = {};
#pragma unroll
    for (int m = 0; m < M; ++m) maximum[m][0] = maximum[m][1] = -INFINITY;

    for (int key_tile = 0; key_tile < key_tiles; ++key_tile) {
      wait_copies<0>();
      __syncthreads();  // all copies are there, and nobody works on the tile before
      const bool last = key_tile + 1 == key_tiles;
      const int next_item = last ? item + walk.splits : item, next_tile = last ? 0 : key_tile + 1;
      const int next_buffer = last && query_buffers == 2 ? buffer ^ 1 : buffer;
      if (walk.stages == 2 && next_item < walk.items) {
        copy(next_item, next_tile, next_buffer, stage ^ 1);
      }
      if (key_tile == 0) {
#pragma unroll
        for (int m = 0; m < M; ++m) {
          load_rows(queries[m], q_tiles + buffer * Tile<D>::bytes(kQueries), first_row + 16 * m);
          if (has_time && window < windows.count) add_time<E>(queries[m], a.temb, time_at);
        }
      }

#pragma unroll 1
      for (int step = 0; step < KEYS; step += 8 * N) {
        float scores[M][N][4] = {};
        multiply_transposed<E>(scores, queries, k_tiles + stage * Tile<D>::bytes(kTileKeys),
                               first_key + step);
        const int first_token = key_tile * kTileKeys + step;
#pragma unroll
        for (int n = 0; n < N; ++n) {
          const int2 place =
              *reinterpret_cast<const int2*>(kept.places + first_token + 8 * n + 2 * t);
#pragma unroll
          for (int m = 0; m < M; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float bias = Kept::bias(biases[m][i / 2], i % 2 ? -place.y : -place.x);
              scores[m][n][i] = fmaf(scores[m][n][i], scale, bias);
            }
          }
        }
        if (first_token + 8 * N > windows.tokens) {
#pragma unroll
          for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              if (first_token + 8 * n + 2 * t + i % 2 < windows.tokens) continue;
#pragma unroll
              for (int m = 0; m < M; ++m) scores[m][n][i] = -INFINITY;
            }
          }
        }

        uint32_t probabilities[M][N / 2][4];
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float largest = maximum[m][i];
#pragma unroll
            for (int n = 0; n < N; ++n) {
              largest = fmaxf(largest, fmaxf(scores[m][n][2 * i], scores[m][n][2 * i + 1]));
            }
            largest = row_max(largest);
            const float safe = largest == -INFINITY ? 0.f : largest;  // not -inf - -inf
            const float factor = exp2_approx(maximum[m][i] - safe);
            maximum[m][i] = largest;
            float part = 0;
#pragma unroll
            for (int n = 0; n < N; ++n) {
              float* score = scores[m][n] + 2 * i;
              score[0] = exp2_approx(score[0] - safe);
              score[1] = exp2_approx(score[1] - safe);
              part += score[0] + score[1];
            }
            sum[m][i] = sum[m][i] * factor + part;
            if (__any_sync(0xffffffffu, factor != 1)) {
#pragma unroll
              for (int n = 0; n < D / 8; ++n) {
                acc[m][n][2 * i] *= factor;
                acc[m][n][2 * i + 1] *= factor;
              }
            }
          }
          to_rows<E>(probabilities[m], scores[m]);
        }
        multiply<E, D>(acc, probabilities, v_tiles + stage * Tile<D>::bytes(kTileKeys),
                       first_key + step);
      }

      if (walk.stages == 2) {
        stage ^= 1;
      } else {
        __syncthreads();
        if (next_item < walk.items) copy(next_item, next_tile, 0, 0);
      }
      buffer = next_buffer;
    }

    const bool valid_window = window < windows.count;
    const int64_t start = valid_window ? windows.start(window) : 0;
#pragma unroll
    for (int m = 0; m < M; ++m) {
      E* rows[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool valid = valid_window && token[m][i] < windows.tokens;
        const float total = row_sum(sum[m][i]), factor = 1 / total;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          acc[m][n][2 * i] *= factor;
          acc[m][n][2 * i + 1] *= factor;
        }
        rows[i] = valid ? static_cast<E*>(a.out) + (start + kept.offsets[token[m][i]]) * channels +
                              head * D
                        : nullptr;
        if (valid && t == 0) {
          a.lse[(int64_t{window} * a.heads + head) * windows.tokens + token[m][i]] =
              maximum[m][i] + log2f(total);
        }
      }
      if (has_time && valid_window) {
        float2 time[D / 8];
        load_time(time, a.temb, time_at + channels);
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[m][n][i] += i % 2 ? time[n].y : time[n].x;
        }
      }
      store_rows(acc[m], rows[0], rows[1]);
    }
  }
}

}  // namespace diffit::cuda
