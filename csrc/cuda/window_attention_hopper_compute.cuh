// What the computing warpgroups of window_attention_hopper.cuh do.
#pragma once

#include "cuda/window_attention_hopper.cuh"

namespace diffit::cuda {

// A warp's 16 queries, plus the time token's part, as wgmma's A.
template <class E, int D>
__device__ __forceinline__ void take_queries(uint32_t (&q)[HopperTile<D, kHopperTokens>::kSteps][4],
                                             const unsigned char* tile, const float* q_t,
                                             bool has_time, int row, int lane) {
  using Tile = HopperTile<D, kHopperTokens>;
#pragma unroll
  for (int step = 0; step < Tile::kSteps; ++step) {
    const bool half = 16 * step + 8 == D;  // of these 16 channels, 8 are zeros
    const int chunk = 2 * step + (half ? 0 : lane / 16);
    load_matrices(q[step], tile + Tile::chunk(row + lane % 16, chunk));
    if (half) q[step][2] = q[step][3] = 0;
    if (!has_time) continue;
#pragma unroll
    for (int i = 0; i < (half ? 2 : 4); ++i) {
      const float2 time =
          *reinterpret_cast<const float2*>(q_t + 16 * step + i / 2 * 8 + lane % 4 * 2);
      const float2 x = pair<E>(q[step][i]);
      q[step][i] = pack<E>(x.x + time.x, x.y + time.y);
    }
  }
}

// Starts the scores of 64 keys, on top of what is there: biases.
template <class E, int D, class Channels>
__device__ __forceinline__ void start_scores(
    float (&scores)[32], const uint32_t (&q)[HopperTile<D, kHopperTokens>::kSteps][4],
    const Channels& keys) {
#pragma unroll
  for (int step = 0; step < HopperTile<D, kHopperTokens>::kSteps; ++step) {
    Wgmma<E, 64>::run(scores, q[step], keys[step], true);
  }
  wgmma_commit();
}

// Starts out (64, D) = (add ? out : 0) + P v for 64 keys.
template <class E, int D, class Tokens>
__device__ __forceinline__ void start_sums(HeadSums<D>& sums, const uint32_t (&p)[4][4],
                                           const Tokens& values, bool add) {
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    sums.template multiply<E>(p[step], values, step, add || step > 0);
  }
  wgmma_commit();
}

__device__ __forceinline__ void take_maximum(float (&maximum)[2], const float (&scores)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) maximum[i / 2 % 2] = fmaxf(maximum[i / 2 % 2], scores[i]);
}

// P = 2^(factor scores - subtrahend) of rows g and g + 8, rounded, as wgmma's A, and its sums.
template <class E>
__device__ __forceinline__ void take_exponentials(uint32_t (&p)[4][4], float (&total)[2],
                                                  float (&scores)[32], float factor,
                                                  const float (&subtrahend)[2]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    scores[i] = exp2_approx(fmaf(scores[i], factor, -subtrahend[i / 2 % 2]));
    total[i / 2 % 2] += scores[i];
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) p[i / 4][i % 4] = pack<E>(scores[2 * i], scores[2 * i + 1]);
}

// A warp's 16 rows of out, on their way to memory.
template <class E, int D, int W>
__device__ __forceinline__ void finish_problem(const HopperForwardArguments& arguments,
                                               HeadSums<D>& sums, const float (&part)[2],
                                               const float (&subtrahend)[2],
                                               HopperProblem<D>& problem, uint64_t* problem_empty,
                                               unsigned char* tile, int head, int token, int lane) {
  float inverse[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float total = row_sum(part[i]);
    inverse[i] = __fdividef(1.f, total);
    if (lane % 4 == 0) {
      arguments.a.lse[problem.lse + token + lane / 4 + 8 * i] = subtrahend[i] + log2f(total);
    }
  }
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
    const float2 time = *reinterpret_cast<const float2*>(problem.v_t + 8 * n + lane % 4 * 2);
    sums.at(n, 0) = fmaf(sums.at(n, 0), inverse[0], time.x);
    sums.at(n, 1) = fmaf(sums.at(n, 1), inverse[0], time.y);
    sums.at(n, 2) = fmaf(sums.at(n, 2), inverse[1], time.x);
    sums.at(n, 3) = fmaf(sums.at(n, 3), inverse[1], time.y);
  }
  if (lane == 0) wait_stores_read();
  __syncwarp();
  sums.template store<E, 16>(tile, 0, lane);
  fence_async_proxy();
  __syncwarp();
  if (lane == 0) {
    HopperShared<D>::OutTile::store(tile, arguments.out, head * D, problem.x + token % W,
                                    problem.y + token / W, problem.sample);
    commit_stores();
    barrier_arrive(problem_empty);
  }
}

template <class E, int D, int W>
__device__ __forceinline__ void attend(const HopperForwardArguments& arguments,
                                       const HopperMemory<D>& memory, int problems, int head) {
  using Tile = HopperTile<D, kHopperTokens>;
  using Biases = HopperBiases<W>;
  const WindowAttention& a = arguments.a;
  const HopperWalk& walk = arguments.walk;
  HopperShared<D>& shared = *memory.shared;
  const int warp = (threadIdx.x - 128) / 32, lane = threadIdx.x % 32, token = 16 * warp;
  const bool has_time = a.temb.data;
  unsigned char* const out_tile = memory.out + warp * HopperShared<D>::kOutBytes;
  const float* const first_bias =
      Biases::start(memory.biases, a.window_height, token + lane / 4, lane % 4);

  // Scores are q k + bias / scale; times `factor` they are exponents of 2.
  const float factor = a.scale * kLog2e;
  // A maximum is left as it is while it is not exceeded by more than 2^8: sums need not be scaled
  // then, and P, up to 2^8, is as exact.
  const float slack = 8 / factor;

  float low[32], high[32];  // scores of 64 keys each
  uint32_t p_low[4][4], p_high[4][4], q[Tile::kSteps][4];
  HeadSums<D> sums;
  float maximum[2], subtrahend[2], total[2], scaling[2];
  float last_subtrahend[2], last_total[2];  // of the problem before
  bool grown;

  HopperStage now, next, first_of_item;  // of keys and values
  HopperStage problem, next_problem;
  int q_parity = 0, reused = 0, tile = 0;
  int v_done = -1;  // values of the step before, if nobody needs them any more
  const auto release = [&](uint64_t* empty) {
    __syncwarp();
    if (lane == 0) barrier_arrive(empty);
  };
  // Returns where the biases of the problem's first keys are.
  const auto take_problem = [&] {
    barrier_wait(shared.problem_full + next_problem.index, next_problem.parity);
    barrier_wait(&shared.q_full, q_parity);
    const HopperProblem<D>& taken = shared.problems[next_problem.index];
    take_queries<E, D>(q, memory.q, taken.q_t, has_time, token, lane);
    release(&shared.q_empty);
    next_problem.advance(2);
    q_parity ^= 1;
    return first_bias + taken.block * Biases::kTile;
  };
  const auto load_scores = [&](float (&scores)[32], const float* biases) {
    Biases::load(scores, biases);
    hold(scores);
  };
  // Maxima of the scores that are under way. Waits follow the products without a branch between
  // them: over one, the compiler loses count of what is under way, and makes the products wait for
  // each other.
  const auto await_scores = [&](float (&largest)[2]) {
    largest[0] = largest[1] = -INFINITY;
    wgmma_wait<3>();
    hold(low);
    take_maximum(largest, low);
    wgmma_wait<1>();
    hold(high);
    hold(q);
    hold(p_low);
    take_maximum(largest, high);
  };
  // The row's maximum, and the first half of P.
  const auto begin_step = [&](float (&largest)[2]) {
    const bool first = tile == 0;
    if (reused + 1 == walk.reuse) release(shared.k_empty + now.index);
    grown = false;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      largest[i] = row_max(largest[i]);
      const float old = first ? -INFINITY : maximum[i];
      const bool exceeded = largest[i] > old + slack;
      maximum[i] = exceeded ? largest[i] : old;
      grown = grown || exceeded;
      subtrahend[i] = maximum[i] == -INFINITY ? 0.f : maximum[i] * factor;  // not -inf - -inf
      scaling[i] = exp2_approx(fmaf(old, factor, -subtrahend[i]));
      total[i] = first ? 0.f : total[i] * scaling[i];
    }
    take_exponentials<E>(p_low, total, low, factor, subtrahend);
  };

  const float* biases = take_problem();
  barrier_wait(shared.k_full, 0);
  load_scores(low, biases);
  load_scores(high, biases - Biases::kTile / 2);
  hold(q);
  wgmma_fence();
  start_scores<E, D>(low, q, typename Tile::Channels(memory.k, 0, memory.zeros));
  wgmma_commit();
  start_scores<E, D>(high, q, typename Tile::Channels(memory.k, 64, memory.zeros));
  wgmma_commit();
  float largest[2];
  await_scores(largest);
  begin_step(largest);

  for (int p = 0;;) {
    const bool first = tile == 0, last = tile + 1 == walk.blocks;
    const bool last_use = reused + 1 == walk.reuse, more = !last || p + 1 < problems;

    // The sums of the step before are complete.
    wgmma_wait<0>();
    hold(p_high);
    sums.hold_all();
    if (v_done >= 0) release(shared.v_empty + v_done);
    v_done = last_use ? now.index : -1;
    if (first) {
      if (p > 0) {
        const int of = problem.index ^ 1;
        finish_problem<E, D, W>(arguments, sums, last_total, last_subtrahend, shared.problems[of],
                                shared.problem_empty + of, out_tile, head, token, lane);
      }
    } else if (__any_sync(0xffffffffu, grown)) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums.at(n, i) *= scaling[i / 2];
      }
    }

    // Low halves: scores of the next step, if only of stale keys after the last one.
    next.advance(walk.stages);
    biases -= Biases::kTile;
    if (last && !last_use) next = first_of_item;
    if (last && more) biases = take_problem();
    if (more) barrier_wait(shared.k_full + next.index, next.parity);
    barrier_wait(shared.v_full + now.index, now.parity);
    const unsigned char* const k_tile = memory.k + next.index * Tile::kBytes;
    const unsigned char* const v_tile = memory.v + now.index * Tile::kBytes;
    load_scores(low, biases);
    hold(q);
    hold(p_low);
    sums.hold_all();
    wgmma_fence();
    start_scores<E, D>(low, q, typename Tile::Channels(k_tile, 0, memory.zeros));
    start_sums<E, D>(sums, p_low, typename Tile::Tokens(v_tile, 0), !first);

    // High halves.
    take_exponentials<E>(p_high, total, high, factor, subtrahend);
    load_scores(high, biases - Biases::kTile / 2);
    hold(p_high);
    wgmma_fence();
    start_scores<E, D>(high, q, typename Tile::Channels(k_tile, 64, memory.zeros));
    start_sums<E, D>(sums, p_high, typename Tile::Tokens(v_tile, 64), true);

    await_scores(largest);
    if (last) {
      p += 1;
      problem.advance(2);
      reused = last_use ? 0 : reused + 1;
      if (last_use) first_of_item = next;
#pragma unroll
      for (int i = 0; i < 2; ++i) last_total[i] = total[i], last_subtrahend[i] = subtrahend[i];
    }
    if (!more) break;
    tile = last ? 0 : tile + 1;
    now = next;
    begin_step(largest);
  }

  wgmma_wait<0>();
  hold(low);
  hold(high);
  sums.hold_all();
  const int of = problem.index ^ 1;
  finish_problem<E, D, W>(arguments, sums, last_total, last_subtrahend, shared.problems[of],
                          shared.problem_empty + of, out_tile, head, token, lane);
  if (lane == 0) wait_stores_read();
}

template <class E, int D, int W>
__global__ void __launch_bounds__(kHopperThreads, 1) window_attention_forward_hopper_kernel(
    const __grid_constant__ HopperForwardArguments arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
  const WindowAttention& a = arguments.a;
  const HopperMemory<D> memory(shared_memory(), arguments.walk.stages);
  HopperShared<D>& shared = *memory.shared;
  const int head = blockIdx.x % a.heads, worker = blockIdx.x / a.heads;
  const int problems = arguments.walk.problems_of(worker);
  const int warpgroup = threadIdx.x / 128;

  if (threadIdx.x == 0) {
    HopperTile<D, kHopperTokens>::prefetch(arguments.qkv);
    HopperTile<D, kHopperTokens>::prefetch(arguments.out);
    for (int i = 0; i < arguments.walk.stages; ++i) {
      barrier_init(shared.k_full + i, 1);
      barrier_init(shared.v_full + i, 1);
      barrier_init(shared.k_empty + i, 8);  // warps that compute
      barrier_init(shared.v_empty + i, 8);
    }
    barrier_init(&shared.q_full, 1);
    barrier_init(&shared.q_empty, 8);
    for (int i = 0; i < 2; ++i) {
      barrier_init(shared.problem_full + i, 1);
      barrier_init(shared.problem_empty + i, 8);
    }
    fence_barriers();
  }
  __syncthreads();

  if (warpgroup == 0) {
    give_registers<40>();
    const int warp = threadIdx.x / 32;
    if (warp == 0 && threadIdx.x % 32 == 0)
      load_keys_and_values<D>(arguments, memory, worker, head);
    if (warp == 1 && threadIdx.x % 32 == 0) load_queries<D>(arguments, memory, worker, head);
    if (warp == 2) describe_problems<D>(arguments, memory, worker, head);
  } else {
    take_registers<232>();
    const int thread = threadIdx.x - 128;
    HopperBiases<W>::fill(memory.biases, a.table, a.window_height, head, a.heads, a.scale, thread,
                          256);
    for (int i = thread; i < HopperShared<D>::kZeros / 16; i += 256) {
      reinterpret_cast<uint4*>(memory.zeros)[i] = make_uint4(0, 0, 0, 0);
    }
    fence_async_proxy();
    sync_some(1, 256);
    if (problems > 0) attend<E, D, W>(arguments, memory, problems, head);
  }
#endif
}

}  // namespace diffit::cuda
