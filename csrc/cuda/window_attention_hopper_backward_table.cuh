// The backward's kernel for Hopper that keeps pairs of blocks: dtable of windows for which the
// query kernel has no room.
//
// A block keeps a head, a block of 128 queries and one of `key_tiles` tiles of keys of the window,
// and walks over windows: it adds dS of its pairs, and sums them by offset at the end.
#pragma once

#include "cuda/hopper_pair_sums.cuh"
#include "cuda/window_attention_hopper_backward.cuh"

namespace diffit::cuda {

template <int D>
struct HopperTableShared {
  using Tile = HopperTile<D, kHopperRows>;
  static constexpr int kPair = 2 * Tile::kBytes;  // keys and values, or q and dO
  static constexpr int kZeros = Tile::kRest > 0 ? 16 * kHopperRows : 0;
  static constexpr int kTilesBytes = kPair + 2 * kHopperRows * int(sizeof(float));

  float lse[2][kHopperRows], negated_delta[2][kHopperRows];  // by warpgroup
  float q_t[2][D];                                           // of a window and the next one
  uint64_t full[kHopperMaxTiles], empty[kHopperMaxTiles];
  uint64_t tiles_full[2], tiles_empty[2];  // q, dO, lse and delta
  uint64_t q_t_full[2], q_t_empty[2];

  static constexpr int bytes(int stages, int bias_bytes, int sum_bytes) {
    return (stages + 2) * kPair + kZeros + int(sizeof(HopperTableShared)) + bias_bytes + sum_bytes;
  }
};

template <int D>
struct HopperTableMemory {
  using Shared = HopperTableShared<D>;
  unsigned char *ring, *tiles, *zeros;
  float2* pair_sums;
  Shared* shared;
  float* biases;

  __device__ __forceinline__ HopperTableMemory(unsigned char* memory, int stages, int sum_bytes)
      : ring(memory),
        tiles(ring + stages * Shared::kPair),
        zeros(tiles + 2 * Shared::kPair),
        pair_sums(reinterpret_cast<float2*>(zeros + Shared::kZeros)),
        shared(reinterpret_cast<Shared*>(zeros + Shared::kZeros + sum_bytes)),
        biases(reinterpret_cast<float*>(shared + 1)) {}
};

// What a block keeps, and the windows that it walks over.
struct HopperTablePair {
  int head, split, query_block, key_block, key_blocks, key_tiles, windows;

  __device__ __forceinline__ explicit HopperTablePair(const HopperBackwardArguments& arguments) {
    const WindowAttention& a = arguments.a;
    const int blocks = arguments.walk.blocks;
    key_tiles = arguments.key_tiles;
    key_blocks = 2 * blocks / key_tiles;
    head = blockIdx.x;
    key_block = blockIdx.y % key_blocks;
    query_block = blockIdx.y / key_blocks;
    split = blockIdx.z;
    windows = (a.windows() - split + arguments.splits - 1) / arguments.splits;
  }
  __device__ __forceinline__ int window(const HopperBackwardArguments& arguments, int n) const {
    return split + n * arguments.splits;
  }
};

// One thread: keys and values of the block's windows.
template <int D>
__device__ __forceinline__ void load_pair_keys(const HopperBackwardArguments& arguments,
                                               const HopperTableMemory<D>& memory,
                                               const HopperTablePair& pair) {
  using Tile = HopperTile<D, kHopperRows>;
  const WindowAttention& a = arguments.a;
  HopperTableShared<D>& shared = *memory.shared;
  HopperStage stage;
  for (int n = 0; n < pair.windows; ++n) {
    const HopperToken first(arguments, pair.window(arguments, n),
                            pair.key_block * pair.key_tiles * kHopperRows);
    for (int step = 0; step < pair.key_tiles; ++step) {
      uint64_t* const full = shared.full + stage.index;
      unsigned char* const tile = memory.ring + stage.index * HopperTableShared<D>::kPair;
      const int y = first.y + step * (kHopperRows / a.window_width);
      const int channel = a.channels() + pair.head * D;
      barrier_wait(shared.empty + stage.index, stage.parity ^ 1);
      barrier_arrive_expecting(full, 2 * Tile::kBytes);
      Tile::load(tile, arguments.qkv, full, channel, first.x, y, first.sample);
      Tile::load(tile + Tile::kBytes, arguments.qkv, full, channel + a.channels(), first.x, y,
                 first.sample);
      stage.advance(arguments.walk.stages);
    }
  }
}

// One thread: what is known of the block's queries.
template <int D>
__device__ __forceinline__ void load_pair_queries(const HopperBackwardArguments& arguments,
                                                  const HopperTableMemory<D>& memory,
                                                  const HopperTablePair& pair) {
  using Tile = HopperTile<D, kHopperRows>;
  const WindowAttention& a = arguments.a;
  HopperTableShared<D>& shared = *memory.shared;
  for (int n = 0; n < pair.windows; ++n) {
    const int window = pair.window(arguments, n);
    for (int group = 0; group < 2; ++group) {
      const int token = (2 * pair.query_block + group) * kHopperRows;
      const int64_t at = (int64_t{window} * a.heads + pair.head) * a.tokens() + token;
      const HopperToken first(arguments, window, token);
      uint64_t* const full = shared.tiles_full + group;
      unsigned char* const tile = memory.tiles + group * HopperTableShared<D>::kPair;
      barrier_wait(shared.tiles_empty + group, n % 2 ^ 1);
      barrier_arrive_expecting(full, HopperTableShared<D>::kTilesBytes);
      Tile::load(tile, arguments.qkv, full, pair.head * D, first.x, first.y, first.sample);
      Tile::load(tile + Tile::kBytes, arguments.grad_out, full, pair.head * D, first.x, first.y,
                 first.sample);
      copy_bytes(shared.lse[group], a.lse + at, sizeof(shared.lse[0]), full);
      copy_bytes(shared.negated_delta[group], arguments.negated_delta + at, sizeof(shared.lse[0]),
                 full);
    }
  }
}

template <class E, int D, int W>
__device__ __forceinline__ void attend_pairs(const HopperBackwardArguments& arguments,
                                             const HopperTableMemory<D>& memory,
                                             const HopperTablePair& pair) {
  using Tile = HopperTile<D, kHopperRows>;
  using Shared = HopperTableShared<D>;
  using Biases = HopperBiases<W>;
  const WindowAttention& a = arguments.a;
  Shared& shared = *memory.shared;
  const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32, group = warp / 4;
  const int row = 16 * (warp % 4);
  const bool has_time = a.temb.data;
  const unsigned char* const tiles = memory.tiles + group * Shared::kPair;
  const float* const biases =
      Biases::start(memory.biases, a.window_height, 16 * warp + lane / 4, lane % 4) +
      pair.query_block * Biases::kTile - pair.key_block * pair.key_tiles * (Biases::kTile / 2);
  const float factor = a.scale * kLog2e;

  float scores[32], dp[32], lse[2], negated_delta[2];
  uint32_t q[Tile::kSteps][4], dout[Tile::kSteps][4];
  HopperStage stage;
  const auto release = [&](uint64_t* empty) {
    __syncwarp();
    if (lane == 0) barrier_arrive(empty);
  };
  for (int n = 0; n < pair.windows; ++n) {
    barrier_wait(shared.tiles_full + group, n % 2);
    take_rows<D>(q, tiles, row, lane);
    take_rows<D>(dout, tiles + Tile::kBytes, row, lane);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      lse[i] = shared.lse[group][row + lane / 4 + 8 * i];
      negated_delta[i] = shared.negated_delta[group][row + lane / 4 + 8 * i];
    }
    release(shared.tiles_empty + group);
    if (has_time) {
      barrier_wait(shared.q_t_full + n % 2, n / 2 % 2);
      add_time<E, D>(q, shared.q_t[n % 2], lane);
      release(shared.q_t_empty + n % 2);
    }
    for (int step = 0; step < pair.key_tiles; ++step) {
      const unsigned char* const keys = memory.ring + stage.index * Shared::kPair;
      barrier_wait(shared.full + stage.index, stage.parity);
      Biases::load(scores, biases - step * (Biases::kTile / 2));
      hold(scores);
      hold(q);
      hold(dout);
      wgmma_fence();
      start_pairs<E, D, 64>(scores, q, typename Tile::Channels(keys, 0, memory.zeros), true);
      start_pairs<E, D, 64>(dp, dout, typename Tile::Channels(keys + Tile::kBytes, 0, memory.zeros),
                            false);
      wgmma_wait<1>();
      hold(scores);
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        scores[i] = exp2_approx(fmaf(scores[i], factor, -lse[i / 2 % 2]));
      }
      wgmma_wait<0>();
      hold(dp);
      hold(q);
      hold(dout);
      release(shared.empty + stage.index);
      stage.advance(arguments.walk.stages);
#pragma unroll
      for (int i = 0; i < 32; ++i) scores[i] *= dp[i] + negated_delta[i / 2 % 2];
      add_pair_sums(memory.pair_sums, step, scores);
    }
  }
}

template <class E, int D, int W>
__global__ void __launch_bounds__(kHopperThreads, 1) window_attention_backward_hopper_table_kernel(
    const __grid_constant__ HopperBackwardArguments arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
  const WindowAttention& a = arguments.a;
  const HopperTableMemory<D> memory(shared_memory(), arguments.walk.stages,
                                    pair_sum_bytes(arguments.key_tiles));
  HopperTableShared<D>& shared = *memory.shared;
  const HopperTablePair pair(arguments);

  if (threadIdx.x == 0) {
    HopperTile<D, kHopperRows>::prefetch(arguments.qkv);
    HopperTile<D, kHopperRows>::prefetch(arguments.grad_out);
    for (int i = 0; i < arguments.walk.stages; ++i) {
      barrier_init(shared.full + i, 1);
      barrier_init(shared.empty + i, 8);  // warps that compute
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(shared.tiles_full + i, 1);
      barrier_init(shared.tiles_empty + i, 4);
      barrier_init(shared.q_t_full + i, 1);
      barrier_init(shared.q_t_empty + i, 8);
    }
    fence_barriers();
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    give_registers<88>();
    const int warp = threadIdx.x / 32;
    const bool first = threadIdx.x % 32 == 0;
    if (warp == 0 && first) load_pair_keys<D>(arguments, memory, pair);
    if (warp == 1 && first) load_pair_queries<D>(arguments, memory, pair);
    if (warp == 2 && a.temb.data) {
      load_times<D>(arguments, shared.q_t, shared.q_t_full, shared.q_t_empty, pair.head,
                    pair.windows, [&](int n) { return pair.window(arguments, n); });
    }
  } else {
    take_registers<208>();
    const int thread = threadIdx.x - 128;
    HopperBiases<W>::fill(memory.biases, a.table, a.window_height, pair.head, a.heads, a.scale,
                          thread, 256);
    for (int i = thread; i < HopperTableShared<D>::kZeros / 16; i += 256) {
      reinterpret_cast<uint4*>(memory.zeros)[i] = make_uint4(0, 0, 0, 0);
    }
    clear_pair_sums(memory.pair_sums, pair.key_tiles);
    fence_async_proxy();
    sync_some(1, 256);
    attend_pairs<E, D, W>(arguments, memory, pair);
    static_assert(4 * HopperTableShared<D>::kPair >= kPairRoom);
    sync_some(1, 256);  // nothing is read from tiles any more, and none are on their way
    store_pair_sums<W>(arguments, memory.pair_sums, memory.ring, pair.head, pair.split,
                       arguments.walk.blocks * pair.key_blocks,
                       pair.query_block * pair.key_blocks + pair.key_block, pair.key_tiles);
  }
#endif
}

}  // namespace diffit::cuda
