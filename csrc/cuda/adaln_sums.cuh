// What adaln's backward does beside its main kernel: sums over whole rows, where these are wider
// than a team, and the last sums over tokens.
#pragma once

#include <cstdint>

#include "cuda/adaln_ahead.cuh"

namespace diffit::cuda {

constexpr int kMeansThreads = 256;

// mean(du) and mean(du x̂) of a row, by one block.
template <class X, int V>
__global__ void __launch_bounds__(kMeansThreads, 4)
    adaln_means_kernel(const __grid_constant__ AdaLNBackward a) {
  float* room = reinterpret_cast<float*>(shared_memory());
  Team::clear(room);
  const Team team(TeamSize::of(kMeansThreads));
  const int row = blockIdx.x, sample = row / a.tokens;
  const int64_t begin = int64_t(row) * a.channels;
  const int64_t scale_begin = a.scale.token_stride ? begin : sample * a.scale.sample_stride;
  const float mean = a.mean[row], rstd = a.rstd[row];
  float total = 0, total_normed = 0;
  for (int c = threadIdx.x * V; c < a.channels; c += kMeansThreads * V) {
    float x[V], du[V], by[V];
    to_floats<X>(x, load<X, V>(static_cast<const X*>(a.x) + begin + c));
    to_floats<X>(du, load<X, V>(static_cast<const X*>(a.grad_out) + begin + c));
    if (a.weight.data) {
      read(by, a.weight.data, a.weight.number, c);
#pragma unroll
      for (int i = 0; i < V; ++i) du[i] *= by[i];
    }
    if (a.scale.data) {
      read(by, a.scale.data, a.scale.number, scale_begin + c);
#pragma unroll
      for (int i = 0; i < V; ++i) du[i] *= 1 + by[i];
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      total += du[i];
      total_normed += du[i] * ((x[i] - mean) * rstd);
    }
  }
  const float2 sums = team.sum_pair(total, total_normed, room);
  if (threadIdx.x == 0) {
    a.row_means[2 * int64_t(row)] = sums.x / a.channels;
    a.row_means[2 * int64_t(row) + 1] = sums.y / a.channels;
  }
}

struct AdaLNSums : AdaLNBackward {
  int columns;  // of a block: a power of two, 8 to kSumThreads
  // (B, C), or null if the gradients of weight and bias are already sums over all samples: what a
  // second launch adds up.
  float *sample_sum, *sample_sum_normed;
};

constexpr int kSumThreads = 512, kSumRoom = 4 * kSumThreads * sizeof(float);

// The gradients of a sample that are sums over its chunks, for some columns; and, of all samples or
// of this one,
//
//     dweight = Σ (1 + scale) Σ h x̂      dbias = Σ (1 + scale) Σ h
//
// where the 1 + scale of a scale per token is in h already.
__global__ void __launch_bounds__(kSumThreads)
    adaln_sums_kernel(const __grid_constant__ AdaLNSums a) {
  float* room = reinterpret_cast<float*>(shared_memory());
  const int blocks = (a.channels + a.columns - 1) / a.columns;
  const int sample = blockIdx.x / blocks, column = threadIdx.x % a.columns;
  const int c = (blockIdx.x - sample * blocks) * a.columns + column;
  // A lane adds up some of a column's chunks; then a warp its lanes, where it has several.
  const int lane = threadIdx.x / a.columns, lanes = kSumThreads / a.columns;
  const int group = a.columns < 32 ? threadIdx.x / 32 : lane;
  const int groups = a.columns < 32 ? kSumThreads / 32 : lanes;
  const float* const rows[4] = {a.sum, a.sum_normed, a.sum_branch, a.sum_dout};
#pragma unroll
  for (int kind = 0; kind < 4; ++kind) {
    if (rows[kind] == nullptr) continue;
    const float* from = rows[kind] + int64_t(sample) * a.chunks * a.channels + c;
    float total = 0;
#pragma unroll 8
    for (int chunk = lane; chunk < a.chunks; chunk += lanes) {
      if (c < a.channels) total += __ldg(from + int64_t(chunk) * a.channels);
    }
    for (int offset = a.columns; offset < 32; offset *= 2) {
      total += __shfl_xor_sync(0xffffffffu, total, offset);
    }
    if (lane % (lanes / groups) == 0) {
      room[kind * kSumThreads + group * a.columns + column] = total;
    }
  }
  __syncthreads();
  if (lane > 0 || c >= a.channels) return;
  float totals[4] = {};
#pragma unroll
  for (int kind = 0; kind < 4; ++kind) {
    if (rows[kind] == nullptr) continue;
#pragma unroll 4
    for (int other = 0; other < groups; ++other) {
      totals[kind] += room[kind * kSumThreads + other * a.columns + column];
    }
  }

  const auto put = [&](void* to, Number number, int64_t at, float value) {
    const float one[1] = {value};
    if (to) write(to, number, at, one);
  };
  const auto get = [&](const void* from, Number number, int64_t at, float otherwise) {
    float one[1] = {otherwise};
    if (from) read(one, from, number, at);
    return one[0];
  };
  const auto [h, h_normed, branch, dout] = totals;
  const int64_t at = int64_t(sample) * a.channels + c;
  if (!a.gate.token_stride) put(a.gate.grad, a.gate.number, at, branch);
  if (!a.shift.token_stride) put(a.shift.grad, a.shift.number, at, a.sum_dout ? dout : h);
  float factor = 1;
  if (!a.scale.token_stride) {
    const float weight = get(a.weight.data, a.weight.number, c, 1);
    const float bias = get(a.bias.data, a.bias.number, c, 0);
    put(a.scale.grad, a.scale.number, at, h_normed * weight + h * bias);
    factor += get(a.scale.data, a.scale.number, sample * a.scale.sample_stride + c, 0);
  }
  if (a.sample_sum) {
    a.sample_sum[at] = h * factor, a.sample_sum_normed[at] = h_normed * factor;
  } else {
    put(a.dweight, a.weight.number, c, h_normed * factor);
    put(a.dbias, a.bias.number, c, h * factor);
  }
}

}  // namespace diffit::cuda
