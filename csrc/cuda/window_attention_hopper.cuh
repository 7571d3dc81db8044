// Windowed attention with a bias from its table and a time token (see window_attention.cuh), for
// Hopper: windows of whole tiles of 128 tokens, 8, 16 or 32 wide.
//
// A block of threads serves one head and stays on its multiprocessor: the head's biases lie in its
// shared memory, and it walks over problems, which are 128 queries of a window. Of its three
// warpgroups one moves data: a warp each for keys and values, for queries, and for what else is
// known of a problem. The other two compute, for 64 queries each; a thread keeps its scores, sums
// and part of q in registers. Halves of 64 keys follow one another without a break, from problem to
// problem, and scores have two sets of registers: in the time of half n
//
//     tensor cores    scores(n + 1) = biases + q k        out += P(n - 1) v
//     the others      P(n) = 2^(factor scores(n) - reference), and its sum
//                                                         maxima of scores(n + 1)
//
// A row's reference is a maximum of its scores so far, and stays while it is not exceeded by more
// than 8 (as an exponent of 2): P, up to 2^8, is as exact then, and neither a maximum over the row
// nor a scaling of the sums is on the way from one half to the next, except where a problem begins.
// Scores start from the biases, divided by the scale: for a score remain a maximum, one
// multiply-add, the exponential, a sum and half a rounding.
//
// What bounds 128 queries x 128 keys, in clocks of a multiprocessor: 1024 for exponentials (16 a
// clock). About 950 to issue the instructions, 4 a clock. For products 512, 1024, 1376, 1536, 2048
// for head_dim 32, 64, 72, 96, 128 (4096 half-precision operations a clock; of 72, 80 in scores,
// and if 8 columns cost as much as 28). For shared memory, 128 bytes a clock, 1250 at head_dim 72:
// 320 for keys and 290 for values, which every warpgroup reads once, 384 for biases, 290 for what
// arrives. From memory 8 bytes per token and channel: with windows of 256 tokens this is the
// longest, 2000 clocks at head_dim 72 and 4.3 TB/s for 132 multiprocessors, so keys and values stay
// for both blocks of queries of such a window, if there is work enough for all multiprocessors.
//
// Tiles are 128 keys since two or more fit for every head_dim beside queries, results and a table
// of 32 x 32 windows; 64 queries for a warpgroup since sums, two sets of scores and of P, and q are
// 208 registers at head_dim 128, of 232.
#pragma once

#include "cuda/hopper_biases.cuh"
#include "cuda/hopper_tile.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/tile.cuh"
#include "cuda/window.cuh"

namespace diffit::cuda {

constexpr int kHopperThreads = 384;  // a warpgroup that moves data, then two that compute
constexpr int kHopperTokens = 128;   // queries of a problem, and keys of a step
constexpr int kHopperMaxStages = 4;
constexpr int kHopperProblems = 3;  // known at a time: the one before, this one and the next

// The problems of a head. An item is a window, or a block of queries of one; a block of threads
// takes every workers-th, and its keys and values serve `reuse` problems, which are all blocks of
// queries of the window, or one.
struct HopperWalk {
  int workers;  // blocks of threads of a head
  int blocks;   // of 128 queries, or keys, in a window
  int reuse;    // `blocks` or 1
  int items;
  int stages;  // steps whose keys and values there is room for
  int windows_of_sample, windows_across;

  __device__ __forceinline__ int problems_of(int worker) const {
    return (items - worker + workers - 1) / workers * reuse;
  }
};

struct HopperForwardArguments {
  WindowAttention a;
  HopperWalk walk;
  TileMaps qkv, out;  // boxes of 128 tokens, and of a warp's 16
};

// What the computing warpgroups are told of a problem.
template <int D>
struct HopperProblem {
  float q_t[D], v_t[D];
  int64_t lse;       // of its first query
  int block;         // of queries, in the window
  int x, y, sample;  // of its first query in the grid
};

// A block's shared memory, but for what has a size known only at the launch.
template <int D>
struct HopperShared {
  using Tile = HopperTile<D, kHopperTokens>;
  using OutTile = HopperTile<D, 16>;
  static constexpr int kOutBytes = (OutTile::kBytes + 1023) / 1024 * 1024;
  static constexpr int kZeros = Tile::kRest > 0 ? 64 * 16 : 0;

  HopperProblem<D> problems[kHopperProblems];
  // `full`: what was asked for has come. `empty`: all warps are done with it.
  uint64_t k_full[kHopperMaxStages], k_empty[kHopperMaxStages];
  uint64_t v_full[kHopperMaxStages], v_empty[kHopperMaxStages];
  uint64_t q_full, q_empty, problem_full[kHopperProblems], problem_empty[kHopperProblems];

  static constexpr int bytes(int stages, int bias_bytes) {
    return (2 * stages + 1) * Tile::kBytes + 8 * kOutBytes + kZeros + int(sizeof(HopperShared)) +
           bias_bytes;
  }
};

template <int D>
struct HopperMemory {
  using Shared = HopperShared<D>;
  unsigned char *k, *v, *q, *out, *zeros;
  Shared* shared;
  float* biases;

  __device__ __forceinline__ HopperMemory(unsigned char* memory, int stages)
      : k(memory),
        v(k + stages * Shared::Tile::kBytes),
        q(v + stages * Shared::Tile::kBytes),
        out(q + Shared::Tile::kBytes),
        zeros(out + 8 * Shared::kOutBytes),
        shared(reinterpret_cast<Shared*>(zeros + Shared::kZeros)),
        biases(reinterpret_cast<float*>(shared + 1)) {}
};

// A place in a ring of `stages`, and the parity of its barriers' phase.
struct HopperStage {
  int index = 0, parity = 0;

  __device__ __forceinline__ void advance(int stages) {
    if (++index == stages) index = 0, parity ^= 1;
  }
};

// Where a problem lies.
struct HopperPlace {
  int window, block, x, y, sample;

  __device__ __forceinline__ HopperPlace(const HopperForwardArguments& arguments, int item,
                                         int reuse_index) {
    const HopperWalk& walk = arguments.walk;
    const int blocks_of_item = walk.blocks / walk.reuse;
    window = item / blocks_of_item;
    block = item % blocks_of_item + reuse_index;
    sample = window / walk.windows_of_sample;
    const int rest = window % walk.windows_of_sample;
    x = rest % walk.windows_across * arguments.a.window_width;
    y = rest / walk.windows_across * arguments.a.window_height;
  }
};

// One thread: all keys and values of the block's items.
template <int D>
__device__ __forceinline__ void load_keys_and_values(const HopperForwardArguments& arguments,
                                                     const HopperMemory<D>& memory, int worker,
                                                     int head) {
  using Tile = HopperTile<D, kHopperTokens>;
  const HopperWalk& walk = arguments.walk;
  const int channels = arguments.a.channels(), rows = kHopperTokens / arguments.a.window_width;
  HopperShared<D>& shared = *memory.shared;
  HopperStage stage;
  for (int item = worker; item < walk.items; item += walk.workers) {
    const HopperPlace place(arguments, item, 0);
    for (int tile = 0; tile < walk.blocks; ++tile) {
      const auto load = [&](unsigned char* to, uint64_t* full, uint64_t* empty, int part) {
        barrier_wait(empty + stage.index, stage.parity ^ 1);
        barrier_arrive_expecting(full + stage.index, Tile::kBytes);
        Tile::load(to + stage.index * Tile::kBytes, arguments.qkv, full + stage.index,
                   part * channels + head * D, place.x, place.y + tile * rows, place.sample);
      };
      load(memory.k, shared.k_full, shared.k_empty, 1);
      load(memory.v, shared.v_full, shared.v_empty, 2);
      stage.advance(walk.stages);
    }
  }
}

// One thread: the queries of the block's problems, each when those before are in registers.
template <int D>
__device__ __forceinline__ void load_queries(const HopperForwardArguments& arguments,
                                             const HopperMemory<D>& memory, int worker, int head) {
  using Tile = HopperTile<D, kHopperTokens>;
  const HopperWalk& walk = arguments.walk;
  const int rows = kHopperTokens / arguments.a.window_width;
  HopperShared<D>& shared = *memory.shared;
  int parity = 1;
  for (int item = worker; item < walk.items; item += walk.workers) {
    for (int i = 0; i < walk.reuse; ++i, parity ^= 1) {
      const HopperPlace place(arguments, item, i);
      barrier_wait(&shared.q_empty, parity);
      barrier_arrive_expecting(&shared.q_full, Tile::kBytes);
      Tile::load(memory.q, arguments.qkv, &shared.q_full, head * D, place.x,
                 place.y + place.block * rows, place.sample);
    }
  }
}

// One warp: the descriptions of the block's problems.
template <int D>
__device__ __forceinline__ void describe_problems(const HopperForwardArguments& arguments,
                                                  const HopperMemory<D>& memory, int worker,
                                                  int head) {
  const WindowAttention& a = arguments.a;
  const HopperWalk& walk = arguments.walk;
  const int lane = threadIdx.x % 32, rows = kHopperTokens / arguments.a.window_width;
  HopperShared<D>& shared = *memory.shared;
  HopperStage stage;
  for (int item = worker; item < walk.items; item += walk.workers) {
    for (int i = 0; i < walk.reuse; ++i, stage.advance(kHopperProblems)) {
      const HopperPlace place(arguments, item, i);
      HopperProblem<D>& problem = shared.problems[stage.index];
      barrier_wait(shared.problem_empty + stage.index, stage.parity ^ 1);
      for (int channel = lane; channel < D; channel += 32) {
        const int64_t at = (int64_t{place.sample} * 2 * a.heads + head) * D + channel;
        problem.q_t[channel] = a.temb.data ? load_number(a.temb, at) : 0.f;
        problem.v_t[channel] = a.temb.data ? load_number(a.temb, at + a.channels()) : 0.f;
      }
      if (lane == 0) {
        problem.block = place.block;
        problem.lse = (int64_t{place.window} * a.heads + head) * (walk.blocks * kHopperTokens) +
                      place.block * kHopperTokens;
        problem.x = place.x;
        problem.y = place.y + place.block * rows;
        problem.sample = place.sample;
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(shared.problem_full + stage.index);
    }
  }
}

}  // namespace diffit::cuda
