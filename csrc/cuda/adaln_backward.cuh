// The gradients of adaln, with x̂ taken again from the saved statistics:
//
//     h  = grad_out (1 + scale), if scale is per token; else grad_out
//     du = h slope        slope = weight (1 + scale), or weight if the 1 + scale is in h
//     dx = rstd (du - mean(du) - x̂ mean(du x̂)) + grad_residual        dy = gate · dx
//
// and, if they are per token, dshift = grad_out, dscale = grad_out (x̂ weight + bias), dgate = y dx.
// A block has a chunk of one sample's tokens. What is to be summed over tokens it sums over its
// chunk, in registers, and leaves as a row; adaln_sums.cuh has the rest.
#pragma once

#include <cstdint>

#include "cuda/adaln_ahead.cuh"

namespace diffit::cuda {

// Shared memory of a block: rooms for two sums over a team, taken in turns; mean and rstd of the
// chunk's rows; then what comes ahead.
constexpr int kRooms = 2 * Team::kRoom * sizeof(float);

// weight, times 1 + scale if scale is per sample.
template <int V, int K, int kStep>
__device__ __forceinline__ void read_slope(float (&slope)[K][V], const AdaLNBackward& a, int sample,
                                           int first) {
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int i = 0; i < V; ++i) slope[k][i] = 1;
    const int c = first + k * kStep;
    if (c >= a.channels) continue;
    if (a.weight.data) read(slope[k], a.weight.data, a.weight.number, c);
    if (a.scale.data && !a.scale.token_stride) {
      float scale[V];
      read(scale, a.scale.data, a.scale.number, sample * a.scale.sample_stride + c);
#pragma unroll
      for (int i = 0; i < V; ++i) slope[k][i] *= 1 + scale[i];
    }
  }
}

template <int V, int K>
struct ColumnSums {
  float h[K][V] = {}, h_normed[K][V] = {}, branch[K][V] = {}, dout[K][V] = {};
};

// Writes the gradients of a shift and a scale per token; makes dout h.
template <int V>
__device__ __forceinline__ void token_gradients(float (&dout)[V], const float (&normed)[V],
                                                const AdaLNBackward& a, int64_t at, int c) {
  if (a.shift.grad && a.shift.token_stride) write(a.shift.grad, a.shift.number, at, dout);
  if (!a.scale.token_stride) return;
  float by[V], dscale[V];
#pragma unroll
  for (int i = 0; i < V; ++i) dscale[i] = normed[i];
  if (a.weight.data) {
    read(by, a.weight.data, a.weight.number, c);
#pragma unroll
    for (int i = 0; i < V; ++i) dscale[i] *= by[i];
  }
  if (a.bias.data) {
    read(by, a.bias.data, a.bias.number, c);
#pragma unroll
    for (int i = 0; i < V; ++i) dscale[i] += by[i];
  }
#pragma unroll
  for (int i = 0; i < V; ++i) dscale[i] *= dout[i];
  if (a.scale.grad) write(a.scale.grad, a.scale.number, at, dscale);
  read(by, a.scale.data, a.scale.number, at);
#pragma unroll
  for (int i = 0; i < V; ++i) dout[i] *= 1 + by[i];
}

// From dx on: dy, and dgate or what it adds to its sum. `gate_at` is where the gate is, `at` where
// everything else.
template <bool kGeneral, int V>
__device__ __forceinline__ void branch_gradients(float (&sum)[V], float (&dx)[V],
                                                 const float (&y)[V], const AdaLNBackward& a,
                                                 int64_t at, int64_t gate_at) {
  float other[V];
  if (kGeneral && a.gate.token_stride) {
#pragma unroll
    for (int i = 0; i < V; ++i) other[i] = y[i] * dx[i];
    if (a.gate.grad) write(a.gate.grad, a.gate.number, at, other);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] += y[i] * dx[i];
  }
  read(other, a.gate.data, a.gate.number, gate_at);
#pragma unroll
  for (int i = 0; i < V; ++i) dx[i] *= other[i];
  write(a.dy, a.y.number, at, dx);
}

// Leaves the sum over the block's teams as a row of `rows`.
template <int V, int K, int kStep>
__device__ __forceinline__ void leave(float* rows, const float (&sum)[K][V], const AdaLNBackward& a,
                                      const Team& team, int first) {
  if (!rows) return;
  float* row = rows + int64_t(blockIdx.x) * a.channels;
  if (team.teams == 1) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int c = first + k * kStep;
      if (c < a.channels) store(row + c, from_floats<float>(sum[k]));
    }
    return;
  }
  float* room = reinterpret_cast<float*>(shared_memory() + kRooms);
  const int width = team.size * (K * V);
  __syncthreads();  // nobody uses the room any more
#pragma unroll
  for (int k = 0; k < K; ++k) {
    store(room + team.index * width + first + k * kStep, from_floats<float>(sum[k]));
  }
  __syncthreads();
  for (int c = threadIdx.x; c < min(width, a.channels); c += blockDim.x) {
    float total = 0;
    for (int other = 0; other < team.teams; ++other) total += room[other * width + c];
    row[c] = total;
  }
}

constexpr int kBackwardThreads = 512, kLeanThreads = 320;  // of a block, at most

// Without kGeneral no modulation is per token, a team has whole rows, and a block has at most 320
// threads, so that a thread has 96 registers: with 1152 channels, 160 threads a row, a
// multiprocessor has 4 blocks.
template <class X, int V, int K, bool kGeneral>
__global__ void __launch_bounds__(kGeneral ? kBackwardThreads : kLeanThreads,
                                  !kGeneral && sizeof(X) == 2 ? 2 : 1)
    adaln_backward_kernel(const __grid_constant__ AdaLNBackward a) {
  constexpr int S = K == 1 ? 1 : 32, kStep = S * V;
  const Team team(a.team);
  const int sample = blockIdx.x / a.chunks, chunk = blockIdx.x - sample * a.chunks;
  const int begin = int64_t(chunk) * a.tokens / a.chunks;
  const int rows = int64_t(chunk + 1) * a.tokens / a.chunks - begin;
  const int64_t first_row = int64_t(sample) * a.tokens + begin, block_at = first_row * a.channels;
  const int first = (kGeneral ? blockIdx.y * team.size * (K * V) : 0) +
                    (team.rank / S * (S * K) + team.rank % S) * V;

  // Of the chunk's rows, the team has `index` and every `step`th from there on.
  const int step = team.teams, stride = step * a.channels, rounds = (rows + step - 1) / step;
  int row = team.index, offset = row * a.channels + first;
  Ahead<X, V, K, kStep> ahead(a, block_at, a.channels - first);
  ahead.start_first(offset, stride, (rows - row + step - 1) / step);

  float* rooms = reinterpret_cast<float*>(shared_memory());
  Team::clear(rooms);
  Team::clear(rooms + Team::kRoom);
  auto* statistics = reinterpret_cast<float2*>(shared_memory() + kRooms);
  for (int i = threadIdx.x; i < rounds * step; i += blockDim.x) {
    statistics[i] = {0, 0};
    if (i < rows) statistics[i] = {__ldg(a.mean + first_row + i), __ldg(a.rstd + first_row + i)};
  }
  float slope[K][V];
  read_slope<V, K, kStep>(slope, a, sample, first);
  ColumnSums<V, K> sums;
  const float inverse = 1.0f / a.channels;
  X* dx_rows = static_cast<X*>(a.dx) + block_at;
  __syncthreads();

  for (int round = 0; round < rounds; ++round) {
    ahead.start(offset + (a.stages - 1) * stride, row + (a.stages - 1) * step < rows);
    const bool valid = row < rows;
    const auto [mean, rstd] = statistics[row];
    ahead.wait();

    float normed[K][V], du[K][V], total = 0, total_normed = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      float x[V], dout[V];
      ahead.x(x, k, offset, valid);
      ahead.grad_out(dout, k, offset, valid);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        normed[k][i] = (x[i] - mean) * rstd;
        if constexpr (kGeneral) sums.dout[k][i] += dout[i];
      }
      if (kGeneral && (a.shift.token_stride || a.scale.token_stride) && valid &&
          first + k * kStep < a.channels) {
        token_gradients(dout, normed[k], a, block_at + offset + k * kStep, first + k * kStep);
      }
#pragma unroll
      for (int i = 0; i < V; ++i) {
        sums.h[k][i] += dout[i];
        sums.h_normed[k][i] += dout[i] * normed[k][i];
        du[k][i] = dout[i] * slope[k][i];
        total += du[k][i];
        total_normed += du[k][i] * normed[k][i];
      }
    }
    float2 means;
    if (kGeneral && a.row_means) {
      means = reinterpret_cast<const float2*>(a.row_means)[first_row + (valid ? row : 0)];
    } else {
      means = team.sum_pair(total, total_normed, rooms + (round & 1) * Team::kRoom);
      means.x *= inverse, means.y *= inverse;
    }
    means.x *= rstd, means.y *= rstd;

#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (!valid || first + k * kStep >= a.channels) continue;
      float dx[V], other[V];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        dx[i] = du[k][i] * rstd - means.x - normed[k][i] * means.y;
      }
      if (a.grad_residual) {
        ahead.grad_residual(other, k, offset);
#pragma unroll
        for (int i = 0; i < V; ++i) dx[i] += other[i];
      }
      store(dx_rows + offset + k * kStep, from_floats<X>(dx));
      const int64_t at = block_at + offset + k * kStep;
      if (a.gate.data) {
        ahead.y(other, k, offset, at);
        const int64_t gate_at = kGeneral && a.gate.token_stride
                                    ? at
                                    : sample * a.gate.sample_stride + first + k * kStep;
        branch_gradients<kGeneral>(sums.branch[k], dx, other, a, at, gate_at);
      } else if (a.dy) {
        write(a.dy, a.y.number, at, dx);
      }
    }
    ahead.advance();
    row += step, offset += stride;
  }
  ahead.wait_all();

  leave<V, K, kStep>(a.sum, sums.h, a, team, first);
  leave<V, K, kStep>(a.sum_normed, sums.h_normed, a, team, first);
  leave<V, K, kStep>(a.sum_branch, sums.branch, a, team, first);
  if constexpr (kGeneral) leave<V, K, kStep>(a.sum_dout, sums.dout, a, team, first);
}

}  // namespace diffit::cuda
