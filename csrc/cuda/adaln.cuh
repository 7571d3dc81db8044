// LayerNorm with adaptive modulation, and the gated residual before it:
//
//     x   <- x + gate · y
//     out  = (x̂ weight + bias) (1 + scale) + shift        x̂ = (x - mean) rstd
//
// A team of threads (team.cuh) holds a row in registers, as it lies in memory, from its one read to
// its one write; mean, then the mean of (x - mean)², are two sums over the team.
#pragma once

#include <cstdint>

#include "cuda/adaln_parameters.cuh"
#include "cuda/adaln_row.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace diffit::cuda {

struct AdaLNForward : AdaLN {
  TeamSize team;  // for a row, or for R of a sample
  int blocks;     // for a sample; for all of them if R is 1
  int steps;      // of a thread over a row, if K is 0
};

// x + gate · y, rounded as it is written to `residual`: the backward normalises the same. `begin`
// is where the thread's numbers begin.
template <class X, class Y, int V, int K, int S, int kLeast, class Row, class Parameters>
__device__ __forceinline__ void add_branch(Row& x, const AdaLN& a,
                                           const Columns<V, K, S, kLeast>& columns,
                                           const Parameters& parameters, int64_t begin, int token) {
  constexpr int kStep = S * V;
  const Y* from = static_cast<const Y*>(a.y.data) + begin;
  constexpr bool kAhead = K > 0 && sizeof(Y) <= sizeof(X);  // there are registers for all of it
  Vector<Y, V> y[kAhead ? K : 1];
  if constexpr (kAhead) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (columns.has(k)) y[k] = load<Y, V>(from + k * kStep);
    }
  }
#pragma unroll
  for (int k = 0; k < columns.steps; ++k) {
    if (!columns.has(k)) continue;
    float sum[V], branch[V];
    if constexpr (kAhead) {
      to_floats<Y>(branch, y[k]);
    } else {
      to_floats<Y>(branch, load<Y, V>(from + k * kStep));
    }
    if (a.gate.data) {
      float gate[V];
      parameters.gate(gate, token, columns.first + k * kStep);
#pragma unroll
      for (int i = 0; i < V; ++i) branch[i] *= gate[i];
    }
    to_floats<X>(sum, x[k]);
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] += branch[i];
    x[k] = from_floats<X>(sum);
    store(static_cast<X*>(a.residual) + begin + k * kStep, x[k]);
  }
}

// Several rows' sums at once take teams of no more than a warp.
template <int R>
__device__ __forceinline__ void sum_rows(float (&values)[R], const Team& team, float* room) {
  if constexpr (R > 1) {
    team.sum_lanes(values);
  } else {
    values[0] = team.sum(values[0], room);
  }
}

// With R = 2 a multiprocessor has 16 to 20 warps (Hopper), and so 32 to 40 rows on their way: with
// 1152 channels of 2 bytes 74 to 92 KB. It is the number of instructions that bounds such rows,
// about 600 a row and warp. Rows of float32 take twice the time: 16 warps, a row each, are 74 KB.
constexpr int forward_threads(int rows) { return rows == 1 ? 448 : 128; }  // of a block, at most

template <class X, int V, int K, int S, int kLeast, int R>
__global__ void __launch_bounds__(forward_threads(R), R == 1 ? 1 : 0)
    adaln_forward_kernel(const __grid_constant__ AdaLNForward a) {
  constexpr int kStep = S * V;
  float* rooms = reinterpret_cast<float*>(shared_memory());
  const Team team(a.team);
  const Columns<V, K, S, kLeast> columns(team, a.channels, a.steps);
  // A team that is one too many does the last row again, a team without a second row its first.
  int sample, token, next = 0;
  if constexpr (R > 1) {
    sample = blockIdx.x / a.blocks;
    token = min((int(blockIdx.x - sample * a.blocks) * team.teams + team.index) * R, a.tokens - 1);
    next = min(1, a.tokens - 1 - token);
  } else {
    const int row = min(int(blockIdx.x * team.teams + team.index), a.samples * a.tokens - 1);
    sample = row / a.tokens, token = row - sample * a.tokens;
  }
  const int64_t row = int64_t(sample) * a.tokens + token;
  const int64_t begin = row * a.channels + columns.first;
  const int stride = next * a.channels;

  typename RowOf<X, V, K>::Type x[R];
  if constexpr (K == 0) {
    x[0].part = reinterpret_cast<Vector<X, V>*>(rooms + 2 * Team::kRoom) + threadIdx.x;
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const X* from = static_cast<const X*>(a.x) + begin + r * stride;
#pragma unroll
    for (int k = 0; k < columns.steps; ++k) {
      x[r][k] = {};
      if (columns.has(k)) x[r][k] = load<X, V>(from + k * kStep);
    }
  }
  const Parameters<(R > 1), V> parameters(a, rooms, sample);
  if constexpr (R > 1) {
    parameters.share();
    __syncthreads();
  }
  if (a.y.data) {
    with_number(a.y.number, [&](auto number) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        add_branch<X, decltype(number)>(x[r], a, columns, parameters, begin + r * stride,
                                        token + r * next);
      }
    });
  }

  float value[V], mean[R] = {}, rstd[R] = {};
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int k = 0; k < columns.steps; ++k) {
      to_floats<X>(value, x[r][k]);
#pragma unroll
      for (int i = 0; i < V; ++i) mean[r] += value[i];
    }
    stay_packed(x[r]);
  }
  sum_rows(mean, team, rooms);
#pragma unroll
  for (int r = 0; r < R; ++r) {
    mean[r] /= a.channels;
#pragma unroll
    for (int k = 0; k < columns.steps; ++k) {
      if (!columns.has(k)) continue;
      to_floats<X>(value, x[r][k]);
#pragma unroll
      for (int i = 0; i < V; ++i) rstd[r] += (value[i] - mean[r]) * (value[i] - mean[r]);
    }
    stay_packed(x[r]);
  }
  sum_rows(rstd, team, rooms + Team::kRoom);
#pragma unroll
  for (int r = 0; r < R; ++r) {
    rstd[r] = rsqrtf(rstd[r] / a.channels + a.eps);
    if (team.rank == 0) a.mean[row + r * next] = mean[r], a.rstd[row + r * next] = rstd[r];
  }

  X* to = static_cast<X*>(a.out) + begin;
#pragma unroll
  for (int k = 0; k < columns.steps; ++k) {
    if (!columns.has(k)) continue;
    float factor[V], offset[V];
    parameters.affine(factor, offset, token, columns.first + k * kStep);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      to_floats<X>(value, x[r][k]);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        value[i] = (value[i] - mean[r]) * rstd[r] * factor[i] + offset[i];
      }
      store(to + r * stride + k * kStep, from_floats<X>(value));
    }
  }
}

}  // namespace diffit::cuda
