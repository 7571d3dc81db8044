// LayerNorm with adaptive modulation, and the gated residual before it:
//
//     x   <- x + gate · y
//     out  = (x̂ weight + bias) (1 + scale) + shift        x̂ = (x - mean) rstd
//
// A team of threads (team.cuh) holds a row in registers, as it lies in memory, from its one read to
// its one write; mean, then the mean of (x - mean)², are two sums over the team. A thread has K
// times V neighbouring columns, S V apart: S threads read what lies on end, and the addresses are
// one and constants.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/ptx/registers.cuh"
#include "cuda/team.cuh"
#include "cuda/vector.cuh"

namespace diffit::cuda {

struct AdaLNForward : AdaLN {
  TeamSize team;  // for a row; or for R, one after the other
  int units;      // of R rows of a sample
  int steps;      // of a thread over a row, if K is 0
};

// With K = 0 as many steps as it takes, and the thread's part of the row in shared memory, where
// its parts are a block's threads apart: for rows that cannot be read in vectors.
template <class X, int V>
struct SharedRow {
  Vector<X, V>* part;
  __device__ __forceinline__ Vector<X, V>& operator[](int k) const { return part[k * blockDim.x]; }
};

// Where the modulation of a token begins.
__device__ __forceinline__ int64_t row_of(const Modulation& modulation, int sample, int token) {
  return sample * modulation.sample_stride + token * modulation.token_stride;
}

// x + gate · y, rounded as it is written to `residual`: the backward normalises the same. `begin`
// and `gate_begin` are where the thread's numbers begin, `count` is how many columns there are from
// there on.
template <class X, class Y, int V, int K, int kStep, class Row>
__device__ __forceinline__ void add_branch(Row& x, const AdaLN& a, int steps, int64_t begin,
                                           int64_t gate_begin, int count) {
  const Y* from = static_cast<const Y*>(a.y.data) + begin;
  constexpr bool kAhead = K > 0 && sizeof(Y) <= sizeof(X);  // there are registers for all of it
  Vector<Y, V> y[kAhead ? K : 1];
  if constexpr (kAhead) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k * kStep < count) y[k] = load<Y, V>(from + k * kStep);
    }
  }
#pragma unroll
  for (int k = 0; k < steps; ++k) {
    if (k * kStep >= count) continue;
    float sum[V], branch[V];
    if constexpr (kAhead) {
      to_floats<Y>(branch, y[k]);
    } else {
      to_floats<Y>(branch, load<Y, V>(from + k * kStep));
    }
    if (a.gate.data) {
      float gate[V];
      read(gate, a.gate.data, a.gate.number, gate_begin + k * kStep);
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

// The factor weight (1 + scale) of x̂, and what is added, bias (1 + scale) + shift.
template <int V>
__device__ __forceinline__ void read_affine(float (&factor)[V], float (&offset)[V], const AdaLN& a,
                                            int c, int64_t scale_at, int64_t shift_at) {
  float by[V];
#pragma unroll
  for (int i = 0; i < V; ++i) factor[i] = 1, offset[i] = 0;
  if (a.weight.data) read(factor, a.weight.data, a.weight.number, c);
  if (a.bias.data) read(offset, a.bias.data, a.bias.number, c);
  if (a.scale.data) {
    read(by, a.scale.data, a.scale.number, scale_at);
#pragma unroll
    for (int i = 0; i < V; ++i) factor[i] *= 1 + by[i], offset[i] *= 1 + by[i];
  }
  if (a.shift.data) {
    read(by, a.shift.data, a.shift.number, shift_at);
#pragma unroll
    for (int i = 0; i < V; ++i) offset[i] += by[i];
  }
}

// So that a row stays as it lies in memory, and not, twice as large, as floats.
template <class X, int V, int K>
__device__ __forceinline__ void stay_packed(Vector<X, V> (&x)[K]) {
  if constexpr (sizeof(X) < 4) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (uint32_t& word : x[k].words) forget(word);
    }
  }
}
template <class X, int V>
__device__ __forceinline__ void stay_packed(SharedRow<X, V>&) {}

// Several rows' sums at once take teams of no more than a warp.
template <int R>
__device__ __forceinline__ void sum_rows(float (&values)[R], const Team& team, float* room) {
  if constexpr (R > 1) {
    team.sum_lanes(values);
  } else {
    values[0] = team.sum(values[0], room);
  }
}

// The most threads of a block, and how many blocks of so many a multiprocessor is to have. With R =
// 2 there are 16 warps, which have 32 rows on their way: with 1152 channels of 2 bytes 74 KB, or
// 111 KB with y. What bounds such rows is how many instructions they take, so two of them share
// what is read for a column. Rows of float32 take twice the time: 16 warps, a row each, are 74 KB.
template <int V, int R>
struct ForwardBlock {
  static constexpr int kThreads = R == 1 ? 448 : 128;
  static constexpr int kBlocks = R == 1 ? 1 : 4;
};

template <class X, int V, int K, int S, int R>
__global__ void __launch_bounds__(ForwardBlock<V, R>::kThreads, ForwardBlock<V, R>::kBlocks)
    adaln_forward_kernel(const __grid_constant__ AdaLNForward a) {
  constexpr int kStep = S * V;
  const int steps = K > 0 ? K : a.steps;
  float* rooms = reinterpret_cast<float*>(shared_memory());
  const Team team(a.team);
  const int unit = blockIdx.x * team.teams + team.index;
  const int of_sample = (a.tokens + R - 1) / R;
  const int sample = a.samples == 1 ? 0 : unit / of_sample;
  const int token = (unit - sample * of_sample) * R;
  const int rows = unit < a.units ? min(R, a.tokens - token) : 0;
  const int first = (team.rank / S * (S * steps) + team.rank % S) * V, columns = a.channels - first;
  const int64_t row = int64_t(sample) * a.tokens + token, begin = row * a.channels + first;

  std::conditional_t<(K > 0), Vector<X, V>[K > 0 ? K : 1], SharedRow<X, V>> x[R];
  if constexpr (K == 0)
    x[0] = {reinterpret_cast<Vector<X, V>*>(rooms + 2 * Team::kRoom) + threadIdx.x};
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      x[r][k] = {};
      if (r >= rows || k * kStep >= columns) continue;
      x[r][k] = load<X, V>(static_cast<const X*>(a.x) + begin + r * a.channels + k * kStep);
    }
  }
  if (a.y.data) {
    with_number(a.y.number, [&](auto number) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        add_branch<X, decltype(number), V, K, kStep>(x[r], a, steps, begin + r * a.channels,
                                                     row_of(a.gate, sample, token + r) + first,
                                                     r < rows ? columns : 0);
      }
    });
  }

  float value[V], mean[R] = {}, rstd[R] = {};
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int k = 0; k < steps; ++k) {
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
    for (int k = 0; k < steps; ++k) {
      if (k * kStep >= columns) continue;
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
    if (team.rank == 0 && r < rows) a.mean[row + r] = mean[r], a.rstd[row + r] = rstd[r];
  }

  const int64_t scale_begin = row_of(a.scale, sample, token) + first;
  const int64_t shift_begin = row_of(a.shift, sample, token) + first;
#pragma unroll
  for (int k = 0; k < steps; ++k) {
    if (k * kStep >= columns) continue;
    float factor[V], offset[V];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (r >= rows) continue;
      if (r == 0 || a.scale.token_stride || a.shift.token_stride) {
        read_affine(factor, offset, a, first + k * kStep,
                    scale_begin + r * a.scale.token_stride + k * kStep,
                    shift_begin + r * a.shift.token_stride + k * kStep);
      }
      to_floats<X>(value, x[r][k]);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        value[i] = (value[i] - mean[r]) * rstd[r] * factor[i] + offset[i];
      }
      store(static_cast<X*>(a.out) + begin + r * a.channels + k * kStep, from_floats<X>(value));
    }
  }
}

}  // namespace diffit::cuda
