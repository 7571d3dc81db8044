// The backward of windowed attention for Hopper; see window_attention_backward.cuh for what is
// computed, window_attention_hopper.cuh for the shapes. Three kernels:
//
//     query    keeps queries            S = (q + q_t) kᵀ, dP = dO vᵀ; dq += dS k
//     key      keeps keys               Sᵀ = k (q + q_t)ᵀ, dPᵀ = v dOᵀ; dv += Pᵀ dO, dk += dSᵀ q
//     table    keeps pairs of blocks    S, dP; dtable
//
// What a product sums over lies in shared memory as TMA brought it. What is kept is A, in registers
// where they suffice, and so are P and dS where they are made: nothing of scores passes through
// memory. Where a window has up to 256 tokens (128 above head_dim 72), the sums of dS over windows
// have room in the shared memory of the query kernel, and there is no table kernel.
//
// As in the forward, a block has a warpgroup that moves data and two that compute, each on 64 rows,
// in steps of 64 columns that follow one another from problem to problem. Products of a step begin
// before anything of it is waited for, and one warpgroup's products fill the other's arithmetic.
//
// What bounds 64 rows x 64 columns at head_dim 72, in clocks of a multiprocessor, in the three
// kernels: products 510, 700 and 320 (of 72, 80 in S and dP; if 8 columns cost as much as 32);
// exponentials 256; instructions, one a clock for a quarter of the rows, about 330, 350 and 250;
// shared memory 590, 540 and 520, of which 190 are the sums of dS where there are any. From memory
// and back, with windows of 256 tokens: 12 bytes per token and channel in each of the first two
// kernels, 750 clocks at 4.3 TB/s for 132 multiprocessors: more than all else. With windows of 1024
// tokens tiles come from the L2 cache, and bound the table kernel.
#pragma once

#include "cuda/ptx/registers.cuh"
#include "cuda/window_attention_hopper.cuh"

namespace diffit::cuda {

constexpr int kHopperRows = 64;     // of a warpgroup
constexpr int kHopperMaxTiles = 8;  // steps whose tiles may be there at a time
// Columns of a step of the query and the key kernel: as many as registers allow.
template <int D>
constexpr int kHopperColumns = D == 128 ? 32 : 64;

struct HopperBackwardArguments {
  WindowAttention a;
  HopperWalk walk;
  int splits;     // blocks of threads that share the windows out; what they sum is added later
  int key_tiles;  // tiles of 64 keys of a pair of blocks, whose queries are 128
  TileMaps qkv, out, grad_out;             // boxes of 64 tokens
  TileMaps qkv_of_step, grad_out_of_step;  // of a step's columns
  TileMaps dqkv;                           // of a warp's 16
  float* negated_delta;                    // (windows, nH, L)
  float* dtemb;                            // (B, parts of a sample, 2C), a part for 64 queries
  float* dtable;                           // (splits, nH, pairs of blocks, offsets of a pair)
};

// Where a window's token lies in the grid.
struct HopperToken {
  int x, y, sample;

  __device__ __forceinline__ HopperToken(const HopperBackwardArguments& arguments, int window,
                                         int token) {
    const HopperWalk& walk = arguments.walk;
    const WindowAttention& a = arguments.a;
    sample = window / walk.windows_of_sample;
    const int rest = window % walk.windows_of_sample;
    x = rest % walk.windows_across * a.window_width + token % a.window_width;
    y = rest / walk.windows_across * a.window_height + token / a.window_width;
  }
};

// A warp's 16 rows of a tile as wgmma's A.
template <int D>
__device__ __forceinline__ void take_rows(uint32_t (&rows)[HopperTile<D, kHopperRows>::kSteps][4],
                                          const unsigned char* tile, int row, int lane) {
  using Tile = HopperTile<D, kHopperRows>;
  uint32_t at = row + lane % 16;
  forget(at);  // addresses, which are many, are not kept from one time to the next
  row = at;
#pragma unroll
  for (int step = 0; step < Tile::kSteps; ++step) {
    const bool half = 16 * step + 8 == D;  // of these 16 channels, 8 are zeros
    const int chunk = 2 * step + (half ? 0 : lane / 16);
    load_matrices(rows[step], tile + Tile::chunk(row, chunk));
    if (half) rows[step][2] = rows[step][3] = 0;
  }
}

// Calls function(both, n, i) for each register of wgmma's A: channels 8 n + 2t and 8 n + 2t + 1 of
// row g + 8 i. n and i are compile-time constants.
template <int D, int kSteps, class Function>
__device__ __forceinline__ void for_each_pair(uint32_t (&rows)[kSteps][4],
                                              const Function& function) {
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) function(rows[n / 2][n % 2 * 2 + i], n, i);
  }
}

// Adds the time token's q part to rows of q, in float32, and rounds once.
template <class E, int D, int kSteps>
__device__ __forceinline__ void add_time(uint32_t (&q)[kSteps][4], const float* q_t, int lane) {
  for_each_pair<D>(q, [&](uint32_t& both, int n, int) {
    const float2 time = *reinterpret_cast<const float2*>(q_t + 8 * n + lane % 4 * 2);
    const float2 x = pair<E>(both);
    both = pack<E>(x.x + time.x, x.y + time.y);
  });
}

// Starts d (64, N) = A Bᵀ + (add ? d : 0), with sums over channels; B is a tile of N tokens.
template <class E, int D, int N, int kSteps>
__device__ __forceinline__ void start_pairs(float (&d)[N / 2], const uint32_t (&a)[kSteps][4],
                                            const typename HopperTile<D, N>::Channels& b,
                                            bool add) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    Wgmma<E, N>::run(d, a[step], b[step], add || step > 0);
  }
  wgmma_commit();
}

// Starts sums (64, D) = (add ? sums : 0) + A B, with sums over the N tokens of a tile B.
template <class E, int D, int N>
__device__ __forceinline__ void start_sums(HeadSums<D>& sums, const uint32_t (&a)[N / 16][4],
                                           const typename HopperTile<D, N>::Tokens& b, bool add) {
#pragma unroll
  for (int step = 0; step < N / 16; ++step) {
    sums.template multiply<E>(a[step], b, step, add || step > 0);
  }
  wgmma_commit();
}

// The time token's q part of a block's problems, by a warp; window_of(n) is the n-th one's.
template <int D, class WindowOf>
__device__ __forceinline__ void load_times(const HopperBackwardArguments& arguments,
                                           float (&q_t)[2][D], uint64_t* full, uint64_t* empty,
                                           int head, int problems, const WindowOf& window_of) {
  const WindowAttention& a = arguments.a;
  const int lane = threadIdx.x % 32;
  for (int n = 0; n < problems; ++n) {
    barrier_wait(empty + n % 2, n / 2 % 2 ^ 1);
    const int64_t sample = window_of(n) / arguments.walk.windows_of_sample;
    for (int channel = lane; channel < D; channel += 32) {
      q_t[n % 2][channel] = load_number(a.temb, (sample * 2 * a.heads + head) * D + channel);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(full + n % 2);
  }
}

// A product's results as the next one's A, rounded.
template <class E, int N>
__device__ __forceinline__ void to_pairs(uint32_t (&a)[N][4], const float (&d)[8 * N]) {
#pragma unroll
  for (int i = 0; i < 4 * N; ++i) a[i / 4][i % 4] = pack<E>(d[2 * i], d[2 * i + 1]);
}

// A warp's 16 rows of sums on their way to a part of dqkv: 0 for dq, 1 for dk, 2 for dv. They pass
// through rows of a tile that belong to the warp, from `row` on.
template <class E, int D>
__device__ __forceinline__ void store_sums(const HopperBackwardArguments& arguments,
                                           HeadSums<D>& sums, unsigned char* tile, int row,
                                           int part, int head, int window, int token, int lane) {
  using Tile = HopperTile<D, kHopperRows>;
  uint32_t forgotten = lane;
  forget(forgotten);
  sums.template store<E, kHopperRows>(tile, row, forgotten);
  fence_async_proxy();
  __syncwarp();
  if (lane != 0) return;
  const HopperToken place(arguments, window, token);
  const int channel = part * arguments.a.channels() + head * D;
#pragma unroll
  for (int i = 0; i < Tile::kParts; ++i) {
    store_box(arguments.dqkv.parts, tile + i * Tile::kPartBytes + row * Tile::kRowBytes,
              channel + i * Tile::kPartChannels, place.x, place.y, place.sample);
  }
  if constexpr (Tile::kRest > 0) {
    store_box(arguments.dqkv.rest, tile + Tile::kRestAt + 16 * row, channel + Tile::kMain, place.x,
              place.y, place.sample);
  }
  commit_stores();
}

}  // namespace diffit::cuda
