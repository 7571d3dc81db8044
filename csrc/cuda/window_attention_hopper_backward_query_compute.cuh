// What the computing warpgroups of window_attention_hopper_backward_query.cuh do:
//
//     step n    start   S(n) = biases + (q + q_t) kᵀ,  dP(n) = dO vᵀ,  dq += dS(n - 1) k
//               P = 2^(factor S(n) - lse)
//               dS(n) = P (dP(n) - delta)
#pragma once

#include "cuda/hopper_pair_sums.cuh"
#include "cuda/window_attention_hopper_backward_query.cuh"

namespace diffit::cuda {

// What a computing warpgroup knows of its 64 queries.
template <class E, int D>
struct HopperQueryRows {
  using Tile = HopperTile<D, kHopperRows>;
  uint32_t q[Tile::kSteps][4], dout[Tile::kSteps][4];  // A: q + q_t, and dO
  float lse[2], negated_delta[2];                      // of rows g and g + 8

  __device__ __forceinline__ void hold_all() {
    hold(q);
    hold(dout);
  }

  // delta = dO (out - v_t), and the sums of dO, come of it.
  __device__ __forceinline__ void take(const unsigned char* tiles, const HopperQueries<D>& queries,
                                       HopperColumnSums<D>& dout_sums, float* delta, int row,
                                       int first_row, bool has_time) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    take_rows<D>(dout, tiles + Tile::kBytes, row, lane);
    take_rows<D>(q, tiles + 2 * Tile::kBytes, row, lane);  // for now, out
    negated_delta[0] = negated_delta[1] = 0;
    float columns[D / 4] = {};
    for_each_pair<D>(dout, [&](uint32_t& both, int n, int i) {
      const float2 x = pair<E>(both), y = pair<E>(q[n / 2][n % 2 * 2 + i]);
      const float2 time = *reinterpret_cast<const float2*>(queries.v_t + 8 * n + 2 * t);
      negated_delta[i] = fmaf(-x.x, y.x - time.x, negated_delta[i]);
      negated_delta[i] = fmaf(-x.y, y.y - time.y, negated_delta[i]);
      columns[2 * n] += x.x;
      columns[2 * n + 1] += x.y;
    });
    if (has_time) dout_sums.put(columns);
    take_rows<D>(q, tiles, row, lane);
    if (has_time) add_time<E, D>(q, queries.q_t, lane);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      negated_delta[i] = row_sum(negated_delta[i]);
      if (t == 0) delta[first_row + row + g + 8 * i] = negated_delta[i];
      lse[i] = queries.lse[first_row + row + g + 8 * i];
    }
  }
};

template <class E, int D, int W, bool kTable>
__device__ __forceinline__ void attend_queries(const HopperBackwardArguments& arguments,
                                               const HopperQueryMemory<D>& memory, int head,
                                               int block, int split) {
  using Tile = HopperTile<D, kHopperRows>;
  using Shared = HopperQueryShared<D>;
  using StepTile = typename Shared::StepTile;
  using Biases = HopperBiases<W>;
  constexpr int N = kHopperColumns<D>;
  const WindowAttention& a = arguments.a;
  Shared& shared = *memory.shared;
  const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32, group = warp / 4;
  const int row = 16 * (warp % 4), tile = 2 * block + group, steps = a.tokens() / N;
  const bool has_time = a.temb.data;
  unsigned char* const tiles = memory.tiles + group * Shared::kTiles;
  const float* const first_bias =
      Biases::start(memory.biases, a.window_height, 16 * warp + lane / 4, lane % 4) +
      block * Biases::kTile;
  // Scores are q k + bias / scale; times `factor` they are exponents of 2.
  const float factor = a.scale * kLog2e;

  HopperQueryRows<E, D> rows;
  float scores[N / 2], dp[N / 2];
  uint32_t ds[N / 16][4];
  HeadSums<D> dq;
  HopperStage now, next;
  int parity = 0, window = split, step = 0;
  const auto release = [&](uint64_t* empty) {
    __syncwarp();
    if (lane == 0) barrier_arrive(empty);
  };
  const auto take_queries = [&] {
    barrier_wait(&shared.queries_full, parity);
    barrier_wait(shared.tiles_full + group, parity);
    barrier_wait(shared.out_full + group, parity);
    parity ^= 1;
    float* const delta = arguments.negated_delta + (int64_t{window} * a.heads + head) * a.tokens() +
                         2 * block * kHopperRows;
    rows.take(tiles, shared.queries, shared.dout_sums[group], delta, row, group * kHopperRows,
              has_time);
    release(shared.tiles_empty + group);
    release(&shared.queries_empty);
  };
  // dq of a window's queries, and of the sums over them what there is: of dq in one window, of dO
  // in another, which may be -1.
  const auto finish_queries = [&](int dq_window, int dout_window) {
    if (dq_window >= 0) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) dq.at(n, i) *= a.scale;
      }
      if (has_time) {
        float columns[D / 4];
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          columns[2 * n] = dq.at(n, 0) + dq.at(n, 2);
          columns[2 * n + 1] = dq.at(n, 1) + dq.at(n, 3);
        }
        shared.dq_sums[group].put(columns);
      }
      store_sums<E, D>(arguments, dq, tiles + 2 * Tile::kBytes, row, 0, head, dq_window,
                       tile * kHopperRows + row, lane);
    }
    if (!has_time) return;
    const auto part = [&](int of) {
      return arguments.dtemb + (int64_t{of} * 2 * arguments.walk.blocks + tile) * 2 * a.channels() +
             head * D;
    };
    sync_some(2 + group, 128);
    if (dq_window >= 0) shared.dq_sums[group].store(part(dq_window));
    if (dout_window >= 0) shared.dout_sums[group].store(part(dout_window) + a.channels());
    sync_some(2 + group, 128);
  };

  // Nothing is under way where the loop begins: the compiler would not follow it.
  take_queries();
#pragma unroll
  for (int i = 0; i < N / 4; ++i) ds[i / 4][i % 4] = 0;
  for (bool begun = false;; begun = true) {
    // Products of the next step, and those with dS of this one: at first with zeros, for nothing.
    const unsigned char* const keys = memory.ring + next.index * Shared::kStage;
    barrier_wait(shared.full + next.index, next.parity);
    Biases::load(scores, first_bias - step * (Biases::kTile * N / 128));
    hold(scores);
    hold(ds);
    rows.hold_all();
    dq.hold_all();
    wgmma_fence();
    start_pairs<E, D, N>(scores, rows.q, typename StepTile::Channels(keys, 0, memory.zeros), true);
    start_pairs<E, D, N>(dp, rows.dout,
                         typename StepTile::Channels(keys + StepTile::kBytes, 0, memory.zeros),
                         false);
    start_sums<E, D, N>(dq, ds,
                        typename StepTile::Tokens(memory.ring + now.index * Shared::kStage, 0),
                        begun && step != 1);

    wgmma_wait<2>();
    hold(scores);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      scores[i] = exp2_approx(fmaf(scores[i], factor, -rows.lse[i / 2 % 2]));
    }
    hold(scores);
    wgmma_wait<0>();
    hold(dp);
    hold(ds);
    rows.hold_all();
    dq.hold_all();
    if (begun) release(shared.empty + now.index);
    if (step == 0) finish_queries(begun ? window - arguments.splits : -1, window);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) scores[i] *= dp[i] + rows.negated_delta[i / 2 % 2];
    if constexpr (kTable) add_pair_sums(memory.pair_sums, step, scores);
    to_pairs<E>(ds, scores);
    if (step == 1) {
      if (lane == 0) wait_stores_read();
      release(shared.out_empty + group);
    }

    now = next;
    next.advance(arguments.walk.stages);
    if (++step < steps) continue;
    step = 0;
    if (window + arguments.splits >= a.windows()) break;
    window += arguments.splits;
    take_queries();
  }
  hold(ds);
  dq.hold_all();
  wgmma_fence();
  start_sums<E, D, N>(dq, ds,
                      typename StepTile::Tokens(memory.ring + now.index * Shared::kStage, 0), true);
  wgmma_wait<0>();
  dq.hold_all();
  finish_queries(window, -1);
  if (lane == 0) wait_stores_read();
}

template <class E, int D, int W, bool kTable>
__global__ void __launch_bounds__(kHopperThreads, 1) window_attention_backward_hopper_query_kernel(
    const __grid_constant__ HopperBackwardArguments arguments) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDA_ARCH__)
  const WindowAttention& a = arguments.a;
  const int tiles = 2 * arguments.walk.blocks, sum_bytes = kTable ? pair_sum_bytes(tiles) : 0;
  const HopperQueryMemory<D> memory(shared_memory(), arguments.walk.stages, sum_bytes);
  HopperQueryShared<D>& shared = *memory.shared;
  const int head = blockIdx.x, block = blockIdx.y, split = blockIdx.z;

  if (threadIdx.x == 0) {
    HopperTile<D, kHopperRows>::prefetch(arguments.qkv);
    HopperTile<D, kHopperRows>::prefetch(arguments.out);
    HopperTile<D, kHopperRows>::prefetch(arguments.grad_out);
    HopperTile<D, kHopperRows>::prefetch(arguments.dqkv);
    for (int i = 0; i < arguments.walk.stages; ++i) {
      barrier_init(shared.full + i, 1);
      barrier_init(shared.empty + i, 8);  // warps that compute
    }
    for (int group = 0; group < 2; ++group) {
      barrier_init(shared.tiles_full + group, 1);
      barrier_init(shared.tiles_empty + group, 4);
      barrier_init(shared.out_full + group, 1);
      barrier_init(shared.out_empty + group, 4);
    }
    barrier_init(&shared.queries_full, 1);
    barrier_init(&shared.queries_empty, 8);
    fence_barriers();
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    give_registers<40>();
    const int warp = threadIdx.x / 32;
    const bool first = threadIdx.x % 32 == 0;
    if (warp == 0 && first) load_window_keys<D>(arguments, memory, head, split);
    if (warp == 1 && first) load_window_queries<D>(arguments, memory, head, block, split, false);
    if (warp == 2 && first) load_window_queries<D>(arguments, memory, head, block, split, true);
    if (warp == 3) describe_queries<D>(arguments, memory, head, block, split);
  } else {
    take_registers<232>();
    const int thread = threadIdx.x - 128;
    HopperBiases<W>::fill(memory.biases, a.table, a.window_height, head, a.heads, a.scale, thread,
                          256);
    for (int i = thread; i < HopperQueryShared<D>::kZeros / 16; i += 256) {
      reinterpret_cast<uint4*>(memory.zeros)[i] = make_uint4(0, 0, 0, 0);
    }
    if constexpr (kTable) clear_pair_sums(memory.pair_sums, tiles);
    fence_async_proxy();
    sync_some(1, 256);
    attend_queries<E, D, W, kTable>(arguments, memory, head, block, split);
    if constexpr (kTable) {
      using Shared = HopperQueryShared<D>;
      static_assert(2 * (Shared::kStage + Shared::kTiles) >= kPairRoom);
      sync_some(1, 256);  // nothing is read from tiles any more, and none are on their way
      store_pair_sums<W>(arguments, memory.pair_sums, memory.ring, head, split,
                         arguments.walk.blocks, block, tiles);
    }
  }
#endif
}

}  // namespace diffit::cuda
