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
  }
  if (!has_time) return;
#pragma unroll
  for (int step = 0; step < Tile::kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < (16 * step + 8 == D ? 2 : 4); ++i) {
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
  maximum[0] = scores[0], maximum[1] = scores[2];
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

// All problems of the block, for a warpgroup's 64 queries of each.
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
  const float factor = a.scale * kLog2e;  // scores, which are q k + bias / scale, to exponents of 2
  const float slack = 8 / factor;

  float low[32], high[32];  // scores of 64 keys
  uint32_t p_low[4][4], p_high[4][4] = {}, q[Tile::kSteps][4];
  HeadSums<D> sums = {};
  float largest[2] = {};                        // of the scores that came last, in this thread
  float reference[2] = {}, subtrahend[2] = {};  // as a score, and as an exponent
  float total[2] = {}, scaling[2] = {};         // of P; of earlier sums, if the reference has grown
  float done_total[2] = {}, done_subtrahend[2] = {};  // of the problem before
  bool grown = false;

  HopperStage before, now, next, first_of_item;  // of keys and values
  HopperStage problem_before, problem, next_problem;
  int q_parity = 0, reused = 0, tile = 0;
  bool before_is_done = false;

  const auto release = [&](uint64_t* empty) {
    __syncwarp();
    if (lane == 0) barrier_arrive(empty);
  };
  const auto await_biases = [&] {
    barrier_wait(shared.problem_full + next_problem.index, next_problem.parity);
    return first_bias + shared.problems[next_problem.index].block * Biases::kTile;
  };
  const auto await_queries = [&] {
    barrier_wait(&shared.q_full, q_parity);
    take_queries<E, D>(q, memory.q, shared.problems[next_problem.index].q_t, has_time, token, lane);
    release(&shared.q_empty);
    next_problem.advance(kHopperProblems);
    q_parity ^= 1;
  };
  // Takes a new reference for the rows that need it; all of them where a problem begins.
  const auto refer = [&](bool first) {
    const bool exceeded = largest[0] > reference[0] + slack || largest[1] > reference[1] + slack;
    grown = first || __any_sync(0xffffffffu, exceeded);
    if (!grown) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (first) done_total[i] = total[i], done_subtrahend[i] = subtrahend[i];
      const float old = first ? -INFINITY : reference[i], row = row_max(largest[i]);
      const bool grows = row > old + slack;
      reference[i] = grows ? row : old;
      subtrahend[i] = reference[i] == -INFINITY ? 0.f : reference[i] * factor;  // not -inf - -inf
      scaling[i] = grows ? exp2_approx(fmaf(old, factor, -subtrahend[i])) : 1.f;
      total[i] = first ? 0.f : total[i] * scaling[i];
    }
  };
  // Also where nothing is known of how far they are: over branches, the compiler loses count of
  // products under way, and would make all of them wait for each other.
  const auto finish_products = [&](uint32_t (&last_p)[4][4]) {
    wgmma_wait<0>();
    hold(last_p);
    sums.hold_all();
  };
  // Starts the scores of the next half, and the sums of the half before; makes P of this half, and
  // takes the maxima of the next one. The wait for values, be they there long since, is a border
  // that the compiler moves no instruction over: the scores' products are all issued before it, and
  // the exponentials come after it, between the sums' products.
  const auto half = [&](float (&scores)[32], uint32_t (&p)[4][4], float (&next_scores)[32],
                        uint32_t (&last_p)[4][4], const auto& keys, const auto& values,
                        uint64_t* values_full, int parity, bool add, const float* biases) {
    hold(next_scores);
    hold(q);
    wgmma_fence();
    start_scores<E, D>(next_scores, q, keys);
    barrier_wait(values_full, parity);
    hold(last_p);
    sums.hold_all();
    wgmma_fence();
    start_sums<E, D>(sums, last_p, values, add);
    take_exponentials<E>(p, total, scores, factor, subtrahend);
    Biases::load(scores, biases);  // of the half after the next
    wgmma_wait<1>();
    hold(next_scores);
    hold(q);
    take_maximum(largest, next_scores);
    hold(largest);
  };
  const auto rescale = [&](uint32_t (&last_p)[4][4]) {
    finish_products(last_p);
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums.at(n, i) *= scaling[i / 2];
    }
  };
  const auto finish = [&](const HopperStage& of) {
    finish_products(p_high);
    finish_problem<E, D, W>(arguments, sums, done_total, done_subtrahend, shared.problems[of.index],
                            shared.problem_empty + of.index, out_tile, head, token, lane);
  };

  const float* biases = await_biases();
  await_queries();
  barrier_wait(shared.k_full, 0);
  Biases::load(low, biases);
  hold(low);
  hold(q);
  wgmma_fence();
  start_scores<E, D>(low, q, typename Tile::Channels(memory.k, 0, memory.zeros));
  wgmma_wait<0>();
  hold(low);
  take_maximum(largest, low);
  refer(true);
  Biases::load(high, biases - Biases::kTile / 2);

  for (int p = 0; p < problems;) {
    const bool first = tile == 0, last = tile + 1 == walk.blocks;
    const bool last_use = reused + 1 == walk.reuse, more = !last || p + 1 < problems;

    // The low half. Values before the first step, and keys after the last one, are whatever lies
    // there: nobody takes what comes of them.
    const bool low_grown = grown;
    biases = last && more ? await_biases() : biases - Biases::kTile;
    finish_products(p_low);
    half(low, p_low, high, p_high,
         typename Tile::Channels(memory.k + now.index * Tile::kBytes, 64, memory.zeros),
         typename Tile::Tokens(memory.v + before.index * Tile::kBytes, 64),
         shared.k_full + now.index, now.parity, true, biases);
    if (last_use) release(shared.k_empty + now.index);
    if (first) {
      if (p > 0) finish(problem_before);
    } else if (low_grown) {
      rescale(p_high);
    }
    refer(false);

    // The high half.
    const bool high_grown = grown;
    next.advance(walk.stages);
    if (last && !last_use) next = first_of_item;
    if (last && more) await_queries();
    if (more) barrier_wait(shared.k_full + next.index, next.parity);
    finish_products(p_high);
    if (before_is_done) release(shared.v_empty + before.index);
    half(high, p_high, low, p_low,
         typename Tile::Channels(memory.k + next.index * Tile::kBytes, 0, memory.zeros),
         typename Tile::Tokens(memory.v + now.index * Tile::kBytes, 0), shared.v_full + now.index,
         now.parity, !first, biases - Biases::kTile / 2);
    if (high_grown) rescale(p_low);
    refer(last);

    before = now;
    before_is_done = last_use;
    now = next;
    tile = last ? 0 : tile + 1;
    if (last) {
      p += 1;
      problem_before = problem;
      problem.advance(kHopperProblems);
      reused = last_use ? 0 : reused + 1;
      if (last_use) first_of_item = next;
    }
  }
  finish_products(p_low);
  wgmma_fence();
  start_sums<E, D>(sums, p_high, typename Tile::Tokens(memory.v + before.index * Tile::kBytes, 64),
                   true);
  finish(problem_before);
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
    for (int i = 0; i < kHopperProblems; ++i) {
      barrier_init(shared.problem_full + i, 1);
      barrier_init(shared.problem_empty + i, 8);
    }
    fence_barriers();
  }
  __syncthreads();

  if (warpgroup == 0) {
    give_registers<40>();  // 168 a thread to begin with: 128 (168 - 40) = 256 (232 - 168)
    const int warp = threadIdx.x / 32;
    const bool one = threadIdx.x % 32 == 0;
    if (warp == 0 && one) load_keys_and_values<D>(arguments, memory, worker, head);
    if (warp == 1 && one) load_queries<D>(arguments, memory, worker, head);
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
