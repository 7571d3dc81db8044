// What the computing warpgroups of window_attention_hopper_backward_key.cuh do:
//
//     step n    start   dk += dSᵀ(n - 1) q,  Sᵀ(n) = biases + k qᵀ,  dPᵀ(n) = v dOᵀ
//               Pᵀ = 2^(factor (Sᵀ(n) + k q_t) - lse)
//               start   dv += Pᵀ dO
//               dSᵀ(n) = Pᵀ (dPᵀ(n) - delta)
//
// The time token's part of the queries is a number for each key in the scores, k q_t, and of rank
// one in dk, (Σ dS) q_t: tiles of q stay as they are.
#pragma once

#include "cuda/window_attention_hopper_backward_key.cuh"

namespace diffit::cuda {

// What a computing warpgroup knows of its 64 keys.
template <class E, int D>
struct HopperKeyRows {
  using Tile = HopperTile<D, kHopperRows>;
  static constexpr bool kInRegisters = HopperKeyShared<D>::kInRegisters;
  static constexpr int kKept = kInRegisters ? Tile::kSteps : 1;

  uint32_t k[kKept][4], v[kKept][4];  // A, if kept in registers
  const unsigned char* tiles;         // if not
  float time[2];                      // k q_t of rows g and g + 8, unless it is part of k

  __device__ __forceinline__ void hold_all() {
    if constexpr (kInRegisters) {
      hold(k);
      hold(v);
    }
  }

  __device__ __forceinline__ void take(const unsigned char* from, const float* q_t, int row,
                                       bool has_time) {
    const int lane = threadIdx.x % 32, t = lane % 4;
    tiles = from;
    time[0] = time[1] = 0;
    uint32_t keys[Tile::kSteps][4];
    if (kInRegisters || has_time) take_rows<D>(keys, from, row, lane);
    if (has_time) {
      for_each_pair<D>(keys, [&](uint32_t& both, int n, int i) {
        const float2 q = *reinterpret_cast<const float2*>(q_t + 8 * n + 2 * t), x = pair<E>(both);
        time[i] = fmaf(x.x, q.x, time[i]);
        time[i] = fmaf(x.y, q.y, time[i]);
      });
#pragma unroll
      for (int i = 0; i < 2; ++i) time[i] = row_sum(time[i]);
    }
    if constexpr (kInRegisters) {
      take_rows<D>(v, from + Tile::kBytes, row, lane);
#pragma unroll
      for (int i = 0; i < 4 * Tile::kSteps; ++i) k[i / 4][i % 4] = keys[i / 4][i % 4];
      if constexpr (Tile::kRest > 0) {
        // The sum has room for 8 channels more, of which the queries' first three are
        // kHopperTimeUnit: what is rounded in three parts is as good as a float32.
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float units = time[i] * (1 / kHopperTimeUnit);
          const float high = pair<E>(pack<E>(units, 0.f)).x, rest = units - high;
          const float middle = pair<E>(pack<E>(rest, 0.f)).x;
          const uint32_t first = pack<E>(high, middle), second = pack<E>(rest - middle, 0.f);
          k[Tile::kSteps - 1][2 + i] = t == 0 ? first : t == 1 ? second : 0;
        }
      }
    }
  }

  // Starts scores += k qᵀ and dp = v dOᵀ.
  template <int N>
  __device__ __forceinline__ void start(float (&scores)[N], float (&dp)[N],
                                        const unsigned char* queries, const unsigned char* units) {
    using StepTile = HopperTile<D, 2 * N>;
    const typename StepTile::Channels q(queries, 0, units);
    const typename StepTile::Channels dout(queries + StepTile::kBytes, 0, units);
    if constexpr (kInRegisters) {
      start_pairs<E, D, 2 * N>(scores, k, q, true);
      start_pairs<E, D, 2 * N>(dp, v, dout, false);
    } else {
      const typename Tile::Channels keys(tiles, 0, units), values(tiles + Tile::kBytes, 0, units);
#pragma unroll
      for (int step = 0; step < Tile::kSteps; ++step) {
        Wgmma<E, 2 * N>::run(scores, keys[step], q[step], true);
      }
      wgmma_commit();
#pragma unroll
      for (int step = 0; step < Tile::kSteps; ++step) {
        Wgmma<E, 2 * N>::run(dp, values[step], dout[step], step > 0);
      }
      wgmma_commit();
    }
  }
};

template <class E, int D, int W>
__device__ __forceinline__ void attend_keys(const HopperBackwardArguments& arguments,
                                            const HopperKeyMemory<D>& memory, int head,
                                            int worker) {
  using Tile = HopperTile<D, kHopperRows>;
  using Shared = HopperKeyShared<D>;
  using StepTile = typename Shared::StepTile;
  using Biases = HopperBiases<W>;
  constexpr int N = kHopperColumns<D>;
  constexpr bool kTimeInKeys = Tile::kRest > 0;
  const WindowAttention& a = arguments.a;
  const HopperWalk& walk = arguments.walk;
  Shared& shared = *memory.shared;
  const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32, group = warp / 4;
  const int row = 16 * (warp % 4), steps = a.tokens() / N;
  const bool has_time = a.temb.data;
  const float* const first_bias =
      Biases::start(memory.biases, a.window_height, 16 * warp + lane / 4, lane % 4);
  const float factor = a.scale * kLog2e;

  HopperKeyRows<E, D> rows;
  float scores[N / 2], dp[N / 2], ds_sum[2] = {};
  uint32_t pairs[N / 16][4];  // P, then dS
  HeadSums<D> dk, dv;
  HopperStage now, next;
  const float* biases;
  int n = 0, step = 0;   // problem, and step of it
  bool last_use;         // of its queries
  bool used_up = false;  // the stage `now`
  const auto release = [&](uint64_t* empty) {
    __syncwarp();
    if (lane == 0) barrier_arrive(empty);
  };
  const auto buffer_of = [&](int problem) { return problem % Shared::kBuffers; };
  const auto take_keys = [&] {
    const int buffer = buffer_of(n);
    barrier_wait(shared.keys_full[group] + buffer, n / Shared::kBuffers % 2);
    if (has_time) barrier_wait(shared.q_t_full + n % 2, n / 2 % 2);
    rows.take(memory.keys_of(group, buffer), shared.q_t[n % 2], row, has_time);
    biases = first_bias + HopperKeyProblem(walk, worker, n).block * Biases::kTile;
    last_use = n % walk.reuse + 1 == walk.reuse;
  };
  const auto finish_keys = [&](int of) {
    if (has_time) ds_sum[0] = row_sum(ds_sum[0]), ds_sum[1] = row_sum(ds_sum[1]);
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      float2 time = make_float2(0.f, 0.f);
      if (has_time) {
        time = *reinterpret_cast<const float2*>(shared.q_t[of % 2] + 8 * i + lane % 4 * 2);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& x = dk.at(i, j);
        x = fmaf(ds_sum[j / 2], j % 2 ? time.y : time.x, x) * a.scale;
      }
    }
    if (has_time) release(shared.q_t_empty + of % 2);
    unsigned char* const tile = memory.keys_of(group, buffer_of(of));
    const HopperKeyProblem problem(walk, worker, of);
    const int token = (2 * problem.block + group) * kHopperRows + row;
    store_sums<E, D>(arguments, dk, tile, row, 1, head, problem.window, token, lane);
    store_sums<E, D>(arguments, dv, tile + Tile::kBytes, row, 2, head, problem.window, token, lane);
  };

  // Nothing is under way where the loop begins: the compiler would not follow it.
  take_keys();
#pragma unroll
  for (int i = 0; i < N / 4; ++i) pairs[i / 4][i % 4] = 0;
  for (bool begun = false;; begun = true) {
    const unsigned char* const queries = memory.ring + next.index * Shared::kStage;
    barrier_wait(shared.full + next.index, next.parity);
    Biases::load(scores, biases - step * (Biases::kTile * N / 128));
    hold(scores);
    hold(pairs);
    rows.hold_all();
    dk.hold_all();
    wgmma_fence();
    start_sums<E, D, N>(dk, pairs,
                        typename StepTile::Tokens(memory.ring + now.index * Shared::kStage, 0),
                        begun && step != 1);  // at first with zeros, for nothing
    rows.start(scores, dp, queries, memory.units);

    wgmma_wait<1>();
    hold(scores);
    hold(pairs);
    dk.hold_all();
    if (used_up) release(shared.empty + now.index);
    if (step == 0 && begun) finish_keys(n - 1);
    const float* const lse = shared.lse[next.index] + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < N / 2; i += 4) {
      const float2 of = *reinterpret_cast<const float2*>(lse + 2 * i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float subtrahend = j % 2 ? of.y : of.x;
        if (!kTimeInKeys) subtrahend = fmaf(-factor, rows.time[j / 2], subtrahend);
        scores[i + j] = exp2_approx(fmaf(scores[i + j], factor, -subtrahend));
      }
    }
    to_pairs<E>(pairs, scores);
    hold(pairs);
    dv.hold_all();
    wgmma_fence();
    start_sums<E, D, N>(dv, pairs, typename StepTile::Tokens(queries + StepTile::kBytes, 0),
                        step > 0);

    wgmma_wait<1>();
    hold(dp);
    rows.hold_all();
    const float* const negated_delta = shared.negated_delta[next.index] + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < N / 2; i += 4) {
      const float2 of = *reinterpret_cast<const float2*>(negated_delta + 2 * i);
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[i + j] *= dp[i + j] + (j % 2 ? of.y : of.x);
    }
    if (has_time) {
      if (step == 0) ds_sum[0] = ds_sum[1] = 0;
#pragma unroll
      for (int i = 0; i < N / 2; ++i) ds_sum[i / 2 % 2] += scores[i];
    }
    wgmma_wait<0>();
    hold(pairs);
    dv.hold_all();
    to_pairs<E>(pairs, scores);
    if (step == 1 && (Shared::kInRegisters || n > 0)) {
      if (lane == 0) wait_stores_read();
      release(shared.keys_empty[group] + buffer_of(n + 1));
    }

    used_up = last_use;
    now = next;
    next.advance(walk.stages);
    if (++step < steps) continue;
    step = 0;
    if (!last_use) {
      // The same queries again; there is room for all of a window's.
      next.index -= steps;
      if (next.index < 0) next.index += walk.stages, next.parity ^= 1;
    }
    if (++n == walk.problems_of(worker)) break;
    take_keys();
  }
  hold(pairs);
  dk.hold_all();
  wgmma_fence();
  start_sums<E, D, N>(dk, pairs,
                      typename StepTile::Tokens(memory.ring + now.index * Shared::kStage, 0), true);
  wgmma_wait<0>();
  dk.hold_all();
  finish_keys(n - 1);
  if (lane == 0) wait_stores_read();
}

template <class E, int D, int W>
__global__ void __launch_bounds__(kHopperThreads, 1) window_attention_backward_hopper_key_kernel(
    const __grid_constant__ HopperBackwardArguments arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
  const WindowAttention& a = arguments.a;
  const HopperKeyMemory<D> memory(shared_memory(), arguments.walk.stages);
  HopperKeyShared<D>& shared = *memory.shared;
  const int head = blockIdx.x, worker = blockIdx.y;

  if (threadIdx.x == 0) {
    HopperTile<D, kHopperRows>::prefetch(arguments.qkv);
    HopperTile<D, kHopperRows>::prefetch(arguments.grad_out);
    HopperTile<D, kHopperRows>::prefetch(arguments.dqkv);
    for (int i = 0; i < arguments.walk.stages; ++i) {
      barrier_init(shared.full + i, 1);
      barrier_init(shared.empty + i, 8);  // warps that compute
    }
    for (int i = 0; i < 2; ++i) {
      for (int buffer = 0; buffer < HopperKeyShared<D>::kBuffers; ++buffer) {
        barrier_init(shared.keys_full[i] + buffer, 1);
        barrier_init(shared.keys_empty[i] + buffer, 4);
      }
      barrier_init(shared.q_t_full + i, 1);
      barrier_init(shared.q_t_empty + i, 8);
    }
    fence_barriers();
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    give_registers<40>();
    const int warp = threadIdx.x / 32;
    const bool first = threadIdx.x % 32 == 0;
    if (warp == 0 && first) load_all_queries<D>(arguments, memory, head, worker);
    if (warp == 1 && first) load_problem_keys<D>(arguments, memory, head, worker);
    if (warp == 2 && a.temb.data) {
      load_times<D>(arguments, shared.q_t, shared.q_t_full, shared.q_t_empty, head,
                    arguments.walk.problems_of(worker),
                    [&](int n) { return HopperKeyProblem(arguments.walk, worker, n).window; });
    }
  } else {
    take_registers<232>();
    const int thread = threadIdx.x - 128;
    HopperBiases<W>::fill(memory.biases, a.table, a.window_height, head, a.heads, a.scale, thread,
                          256, true);
    for (int i = thread; i < HopperKeyShared<D>::kUnits / 16; i += 256) {
      reinterpret_cast<uint4*>(memory.units)[i] = make_uint4(
          pack<E>(kHopperTimeUnit, kHopperTimeUnit), pack<E>(kHopperTimeUnit, 0.f), 0, 0);
    }
    fence_async_proxy();
    sync_some(1, 256);
    attend_keys<E, D, W>(arguments, memory, head, worker);
  }
#endif
}

}  // namespace diffit::cuda
