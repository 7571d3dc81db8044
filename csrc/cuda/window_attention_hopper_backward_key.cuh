// The backward's kernel for Hopper that keeps keys: its shared memory, and who fills it. It makes
// dk and dv.
//
// A problem is 128 keys of a window; a block of threads walks over problems of a head as in the
// forward, with keys in the place of queries. k and v are A. Up to head_dim 72 they are kept in
// registers, and their tiles have room for dk and dv of the keys before while those are stored.
// Above, there are two pairs of tiles.
#pragma once

#include "cuda/window_attention_hopper_backward.cuh"

namespace diffit::cuda {

// In the scores of head_dim 72 the time token's part is carried by channels of the padding, which
// have this value in the queries: a power of two with which float16 does not overflow.
constexpr float kHopperTimeUnit = 64;

template <int D>
struct HopperKeyShared {
  using Tile = HopperTile<D, kHopperRows>;
  using StepTile = HopperTile<D, kHopperColumns<D>>;
  static constexpr bool kInRegisters = D <= 72;
  static constexpr int kBuffers = kInRegisters ? 1 : 2;
  static constexpr int kKeys = 2 * Tile::kBytes;       // k, then v, of a warpgroup
  static constexpr int kStage = 2 * StepTile::kBytes;  // q, then dO
  static constexpr int kUnits = Tile::kRest > 0 ? 16 * kHopperRows : 0;  // padding of the queries

  float lse[kHopperMaxTiles][kHopperColumns<D>], negated_delta[kHopperMaxTiles][kHopperColumns<D>];
  float q_t[2][D];  // of a problem and the next one
  uint64_t full[kHopperMaxTiles], empty[kHopperMaxTiles];
  uint64_t keys_full[2][2], keys_empty[2][2];  // by warpgroup and buffer
  uint64_t q_t_full[2], q_t_empty[2];

  static constexpr int bytes(int stages, int bias_bytes) {
    return stages * kStage + 2 * kBuffers * kKeys + kUnits + int(sizeof(HopperKeyShared)) +
           bias_bytes;
  }
};

template <int D>
struct HopperKeyMemory {
  using Shared = HopperKeyShared<D>;
  unsigned char *ring, *keys, *units;
  Shared* shared;
  float* biases;

  __device__ __forceinline__ HopperKeyMemory(unsigned char* memory, int stages)
      : ring(memory),
        keys(ring + stages * Shared::kStage),
        units(keys + 2 * Shared::kBuffers * Shared::kKeys),
        shared(reinterpret_cast<Shared*>(units + Shared::kUnits)),
        biases(reinterpret_cast<float*>(shared + 1)) {}

  __device__ __forceinline__ unsigned char* keys_of(int group, int buffer) const {
    return keys + (group * Shared::kBuffers + buffer) * Shared::kKeys;
  }
};

// The block's n-th problem: 128 keys of a window.
struct HopperKeyProblem {
  int window, block;

  __device__ __forceinline__ HopperKeyProblem(const HopperWalk& walk, int worker, int n) {
    const int item = worker + n / walk.reuse * walk.workers, of_item = walk.blocks / walk.reuse;
    window = item / of_item;
    block = item % of_item + n % walk.reuse;
  }
};

// One thread: q, dO and what else is known of the queries of the block's items.
template <int D>
__device__ __forceinline__ void load_all_queries(const HopperBackwardArguments& arguments,
                                                 const HopperKeyMemory<D>& memory, int head,
                                                 int worker) {
  using Tile = HopperTile<D, kHopperColumns<D>>;
  constexpr int N = kHopperColumns<D>;
  const WindowAttention& a = arguments.a;
  const HopperWalk& walk = arguments.walk;
  HopperKeyShared<D>& shared = *memory.shared;
  HopperStage stage;
  for (int n = 0; n < walk.problems_of(worker); n += walk.reuse) {
    const int window = HopperKeyProblem(walk, worker, n).window;
    const HopperToken first(arguments, window, 0);
    const int64_t rows_at = (int64_t{window} * a.heads + head) * a.tokens();
    for (int step = 0; step < a.tokens() / N; ++step) {
      uint64_t* const full = shared.full + stage.index;
      unsigned char* const tile = memory.ring + stage.index * HopperKeyShared<D>::kStage;
      const int y = first.y + step * (N / a.window_width);
      const int64_t at = rows_at + step * N;
      barrier_wait(shared.empty + stage.index, stage.parity ^ 1);
      barrier_arrive_expecting(full, 2 * Tile::kBytes + 2 * int(sizeof(shared.lse[0])));
      Tile::load(tile, arguments.qkv_of_step, full, head * D, first.x, y, first.sample);
      Tile::load(tile + Tile::kBytes, arguments.grad_out_of_step, full, head * D, first.x, y,
                 first.sample);
      copy_bytes(shared.lse[stage.index], a.lse + at, sizeof(shared.lse[0]), full);
      copy_bytes(shared.negated_delta[stage.index], arguments.negated_delta + at,
                 sizeof(shared.lse[0]), full);
      stage.advance(walk.stages);
    }
  }
}

// One thread: k and v of the block's problems.
template <int D>
__device__ __forceinline__ void load_problem_keys(const HopperBackwardArguments& arguments,
                                                  const HopperKeyMemory<D>& memory, int head,
                                                  int worker) {
  using Tile = HopperTile<D, kHopperRows>;
  const WindowAttention& a = arguments.a;
  const HopperWalk& walk = arguments.walk;
  HopperKeyShared<D>& shared = *memory.shared;
  HopperStage buffer;
  for (int n = 0; n < walk.problems_of(worker); ++n) {
    const HopperKeyProblem problem(walk, worker, n);
    for (int group = 0; group < 2; ++group) {
      const int token = (2 * problem.block + group) * kHopperRows;
      const HopperToken first(arguments, problem.window, token);
      uint64_t* const full = shared.keys_full[group] + buffer.index;
      unsigned char* const tile = memory.keys_of(group, buffer.index);
      const int channel = a.channels() + head * D;
      barrier_wait(shared.keys_empty[group] + buffer.index, buffer.parity ^ 1);
      barrier_arrive_expecting(full, 2 * Tile::kBytes);
      Tile::load(tile, arguments.qkv, full, channel, first.x, first.y, first.sample);
      Tile::load(tile + Tile::kBytes, arguments.qkv, full, channel + a.channels(), first.x, first.y,
                 first.sample);
    }
    buffer.advance(HopperKeyShared<D>::kBuffers);
  }
}

}  // namespace diffit::cuda
