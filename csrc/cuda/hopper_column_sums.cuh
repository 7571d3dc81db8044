// Sums of a warpgroup's 64 rows of D numbers, for Hopper.
#pragma once

#include "cuda/ptx/numbers.cuh"

namespace diffit::cuda {

// Adds the lanes' numbers over one bit of the lane: of N numbers, lanes in which it is set are left
// with the sums of the second half, the others with those of the first, which may be one more.
template <int N>
__device__ __forceinline__ void sum_half(float* numbers, int mask) {
  constexpr int kHalf = (N + 1) / 2;
  const bool upper = threadIdx.x & mask;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float second = i + kHalf < N ? numbers[i + kHalf] : 0.f;
    const float sent = upper ? numbers[i] : second, kept = upper ? second : numbers[i];
    numbers[i] = kept + __shfl_xor_sync(0xffffffffu, sent, mask);
  }
}

template <int D>
struct HopperColumnSums {
  float warps[4][D];

  // A warp's part: columns[2 n + i] is what the lane has of column 8 n + 2t + i.
  __device__ __forceinline__ void put(float (&columns)[D / 4]) {
    constexpr int kFirst = (D / 4 + 1) / 2, kSecond = (kFirst + 1) / 2, kThird = (kSecond + 1) / 2;
    sum_half<D / 4>(columns, 16);
    sum_half<kFirst>(columns, 8);
    sum_half<kSecond>(columns, 4);
    const int lane = threadIdx.x % 32;
    float* const to = warps[threadIdx.x / 32 % 4] + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kThird; ++i) {
      // Beyond the end of a half there is nothing.
      const int in_second = i + (lane & 4 ? kThird : 0);
      const int in_first = in_second + (lane & 8 ? kSecond : 0);
      const int column = in_first + (lane & 16 ? kFirst : 0);
      if (in_second < kSecond && in_first < kFirst && column < D / 4) {
        to[column / 2 * 8 + column % 2] = columns[i];
      }
    }
  }

  // The warpgroup, after a barrier.
  __device__ __forceinline__ void store(float* to) const {
    const int column = threadIdx.x % 128;
    if (column < D) {
      to[column] = warps[0][column] + warps[1][column] + warps[2][column] + warps[3][column];
    }
  }
};

}  // namespace diffit::cuda
