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

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/ptx/registers.cuh"
#include "cuda/team.cuh"
#include "cuda/vector.cuh"

namespace diffit::cuda {

struct AdaLNForward : AdaLN {
  int team;  // threads of a row
};

// Where the modulation of a token begins.
__device__ __forceinline__ int64_t row_of(const Modulation& modulation, int sample, int token) {
  return sample * modulation.sample_stride + token * modulation.token_stride;
}

// x + gate · y, rounded as it is written to `residual`: the backward normalises the same. `begin`
// and `gate` are where the thread's numbers begin, `count` is how many there are from there on.
template <class X, class Y, int V, int K, int kStep>
__device__ __forceinline__ void add_branch(Vector<X, V> (&x)[K], const AdaLN& a, int64_t begin,
                                           int64_t gate_begin, int count) {
  const Y* from = static_cast<const Y*>(a.y.data) + begin;
  constexpr bool kAhead = sizeof(Y) <= sizeof(X);  // there are registers for all of it
  Vector<Y, V> y[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (kAhead && k * kStep < count) y[k] = load<Y, V>(from + k * kStep);
  }
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (k * kStep >= count) continue;
    float sum[V], branch[V];
    to_floats<Y>(branch, kAhead ? y[k] : load<Y, V>(from + k * kStep));
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

// V numbers of x̂ with the affine parameters and the modulation that are given.
template <int V>
__device__ __forceinline__ void modulate(float (&value)[V], const AdaLN& a, int c, int64_t scale_at,
                                         int64_t shift_at) {
  float by[V];
  if (a.weight.data) {
    read(by, a.weight.data, a.weight.number, c);
#pragma unroll
    for (int i = 0; i < V; ++i) value[i] *= by[i];
  }
  if (a.bias.data) {
    read(by, a.bias.data, a.bias.number, c);
#pragma unroll
    for (int i = 0; i < V; ++i) value[i] += by[i];
  }
  if (a.scale.data) {
    read(by, a.scale.data, a.scale.number, scale_at);
#pragma unroll
    for (int i = 0; i < V; ++i) value[i] *= 1 + by[i];
  }
  if (a.shift.data) {
    read(by, a.shift.data, a.shift.number, shift_at);
#pragma unroll
    for (int i = 0; i < V; ++i) value[i] += by[i];
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

constexpr int kForwardThreads = 448, kScalarThreads = 512;  // of a block, at most

// Two blocks of 448 threads leave each 72 registers: 28 warps in all, each with a row of its own on
// its way. With 1152 channels of 2 bytes these are 64 KB, or 129 KB with y. Rows of float32 take
// 128 registers, 16 warps, and as many bytes.
template <class X, int V, int K, int S>
__global__ void __launch_bounds__(V == 1 ? kScalarThreads : kForwardThreads, V == 8 ? 2 : 1)
    adaln_forward_kernel(const __grid_constant__ AdaLNForward a) {
  constexpr int kStep = S * V;
  float* room = reinterpret_cast<float*>(shared_memory());
  const Team team(a.team);
  const int row = blockIdx.x * team.teams() + team.index;
  const int first = (team.rank / S * (S * K) + team.rank % S) * V;
  const bool inside = row < a.samples * a.tokens;
  const int count = inside ? a.channels - first : 0;
  const int sample = row / a.tokens, token = row - sample * a.tokens;
  const int64_t begin = int64_t(row) * a.channels + first;

  Vector<X, V> x[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    x[k] = {};
    if (k * kStep < count) x[k] = load<X, V>(static_cast<const X*>(a.x) + begin + k * kStep);
  }
  if (a.y.data) {
    const int64_t gate_begin = row_of(a.gate, sample, token) + first;
    with_number(a.y.number, [&](auto number) {
      add_branch<X, decltype(number), V, K, kStep>(x, a, begin, gate_begin, count);
    });
  }

  float value[V], total = 0;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    to_floats<X>(value, x[k]);
#pragma unroll
    for (int i = 0; i < V; ++i) total += value[i];
  }
  const float mean = team.sum(total, room) / a.channels;
  stay_packed(x);
  total = 0;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (k * kStep >= count) continue;
    to_floats<X>(value, x[k]);
#pragma unroll
    for (int i = 0; i < V; ++i) total += (value[i] - mean) * (value[i] - mean);
  }
  total = team.sum(total, room + Team::kRoom);
  const float rstd = rsqrtf(total / a.channels + a.eps);
  if (!inside) return;
  stay_packed(x);

  const int64_t scale_begin = row_of(a.scale, sample, token) + first;
  const int64_t shift_begin = row_of(a.shift, sample, token) + first;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (k * kStep >= count) continue;
    to_floats<X>(value, x[k]);
#pragma unroll
    for (int i = 0; i < V; ++i) value[i] = (value[i] - mean) * rstd;
    modulate(value, a, first + k * kStep, scale_begin + k * kStep, shift_begin + k * kStep);
    store(static_cast<X*>(a.out) + begin + k * kStep, from_floats<X>(value));
  }
  if (team.rank == 0) a.mean[row] = mean, a.rstd[row] = rstd;
}

}  // namespace diffit::cuda
