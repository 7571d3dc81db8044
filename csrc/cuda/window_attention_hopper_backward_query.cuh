// The backward's kernel for Hopper that keeps queries: its shared memory, and who fills it. It
// makes dq, delta, the time token's gradient and, where there is room for its sums, dtable.
//
// A block keeps a head and a block of 128 queries of the window, and walks over windows.
#pragma once

#include "cuda/hopper_column_sums.cuh"
#include "cuda/window_attention_hopper_backward.cuh"

namespace diffit::cuda {

// What is known of a window's block of queries.
template <int D>
struct HopperQueries {
  float q_t[D], v_t[D], lse[2 * kHopperRows];
};

template <int D>
struct HopperQueryShared {
  using Tile = HopperTile<D, kHopperRows>;
  using StepTile = HopperTile<D, kHopperColumns<D>>;
  static constexpr int kStage = 2 * StepTile::kBytes;  // keys, then values
  static constexpr int kTiles = 3 * Tile::kBytes;      // of a warpgroup: q, dO, and out, then dq
  static constexpr int kZeros = Tile::kRest > 0 ? 16 * kHopperRows : 0;

  HopperQueries<D> queries;
  HopperColumnSums<D> dq_sums[2], dout_sums[2];
  uint64_t full[kHopperMaxTiles], empty[kHopperMaxTiles];
  uint64_t tiles_full[2], tiles_empty[2];  // q and dO
  uint64_t out_full[2], out_empty[2];
  uint64_t queries_full, queries_empty;

  static constexpr int bytes(int stages, int bias_bytes, int sum_bytes) {
    return stages * kStage + 2 * kTiles + kZeros + int(sizeof(HopperQueryShared)) + bias_bytes +
           sum_bytes;
  }
};

template <int D>
struct HopperQueryMemory {
  using Shared = HopperQueryShared<D>;
  unsigned char *ring, *tiles, *zeros;
  float2* pair_sums;
  Shared* shared;
  float* biases;

  __device__ __forceinline__ HopperQueryMemory(unsigned char* memory, int stages, int sum_bytes)
      : ring(memory),
        tiles(ring + stages * Shared::kStage),
        zeros(tiles + 2 * Shared::kTiles),
        pair_sums(reinterpret_cast<float2*>(zeros + Shared::kZeros)),
        shared(reinterpret_cast<Shared*>(zeros + Shared::kZeros + sum_bytes)),
        biases(reinterpret_cast<float*>(shared + 1)) {}
};

// One thread: keys and values of the block's windows.
template <int D>
__device__ __forceinline__ void load_window_keys(const HopperBackwardArguments& arguments,
                                                 const HopperQueryMemory<D>& memory, int head,
                                                 int split) {
  using Tile = HopperTile<D, kHopperColumns<D>>;
  const WindowAttention& a = arguments.a;
  const int rows = kHopperColumns<D> / a.window_width;
  HopperQueryShared<D>& shared = *memory.shared;
  HopperStage stage;
  for (int window = split; window < a.windows(); window += arguments.splits) {
    const HopperToken first(arguments, window, 0);
    for (int step = 0; step < a.tokens() / kHopperColumns<D>; ++step) {
      uint64_t* const full = shared.full + stage.index;
      unsigned char* const tile = memory.ring + stage.index * HopperQueryShared<D>::kStage;
      const int y = first.y + step * rows, channel = a.channels() + head * D;
      barrier_wait(shared.empty + stage.index, stage.parity ^ 1);
      barrier_arrive_expecting(full, 2 * Tile::kBytes);
      Tile::load(tile, arguments.qkv_of_step, full, channel, first.x, y, first.sample);
      Tile::load(tile + Tile::kBytes, arguments.qkv_of_step, full, channel + a.channels(), first.x,
                 y, first.sample);
      stage.advance(arguments.walk.stages);
    }
  }
}

// One thread: q and dO, or out, of the block's windows, each when there is room.
template <int D>
__device__ __forceinline__ void load_window_queries(const HopperBackwardArguments& arguments,
                                                    const HopperQueryMemory<D>& memory, int head,
                                                    int block, int split, bool out) {
  using Tile = HopperTile<D, kHopperRows>;
  const WindowAttention& a = arguments.a;
  HopperQueryShared<D>& shared = *memory.shared;
  int parity = 1;
  for (int window = split; window < a.windows(); window += arguments.splits, parity ^= 1) {
    for (int group = 0; group < 2; ++group) {
      const HopperToken first(arguments, window, (2 * block + group) * kHopperRows);
      uint64_t* const full = (out ? shared.out_full : shared.tiles_full) + group;
      uint64_t* const empty = (out ? shared.out_empty : shared.tiles_empty) + group;
      unsigned char* const tiles = memory.tiles + group * HopperQueryShared<D>::kTiles;
      barrier_wait(empty, parity);
      barrier_arrive_expecting(full, out ? Tile::kBytes : 2 * Tile::kBytes);
      if (out) {
        Tile::load(tiles + 2 * Tile::kBytes, arguments.out, full, head * D, first.x, first.y,
                   first.sample);
      } else {
        Tile::load(tiles, arguments.qkv, full, head * D, first.x, first.y, first.sample);
        Tile::load(tiles + Tile::kBytes, arguments.grad_out, full, head * D, first.x, first.y,
                   first.sample);
      }
    }
  }
}

// One warp: all else that is known of the block's queries.
template <int D>
__device__ __forceinline__ void describe_queries(const HopperBackwardArguments& arguments,
                                                 const HopperQueryMemory<D>& memory, int head,
                                                 int block, int split) {
  const WindowAttention& a = arguments.a;
  const int lane = threadIdx.x % 32;
  HopperQueryShared<D>& shared = *memory.shared;
  HopperQueries<D>& queries = shared.queries;
  int parity = 1;
  for (int window = split; window < a.windows(); window += arguments.splits, parity ^= 1) {
    barrier_wait(&shared.queries_empty, parity);
    const int sample = window / arguments.walk.windows_of_sample;
    for (int channel = lane; channel < D; channel += 32) {
      const int64_t at = (int64_t{sample} * 2 * a.heads + head) * D + channel;
      queries.q_t[channel] = a.temb.data ? load_number(a.temb, at) : 0.f;
      queries.v_t[channel] = a.temb.data ? load_number(a.temb, at + a.channels()) : 0.f;
    }
    const float* const lse =
        a.lse + (int64_t{window} * a.heads + head) * a.tokens() + 2 * block * kHopperRows;
#pragma unroll
    for (int i = 0; i < 2 * kHopperRows; i += 32) queries.lse[i + lane] = lse[i + lane];
    __syncwarp();
    if (lane == 0) barrier_arrive(&shared.queries_full);
  }
}

}  // namespace diffit::cuda
