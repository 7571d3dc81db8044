// The threads of a block that share a row, and their sums.
#pragma once

#include <cstdint>

namespace diffit::cuda {

// A team is a power of two of threads up to 32, or whole warps. A block has about 128 threads, or
// one team of more.
struct TeamSize {
  int threads;
  unsigned inverse;  // 2^22 / threads, rounded up: exact enough to divide up to 1024 by a product

  static constexpr TeamSize of(int threads) {
    return {threads, ((1u << 22) + threads - 1) / threads};
  }
  constexpr int block_threads() const { return threads < 128 ? 128 / threads * threads : threads; }
  constexpr int teams(int block_threads) const { return block_threads * inverse >> 22; }
};

struct Team {
  int size, teams, index, rank;  // teams of the block, index of this one, rank of the thread in it

  __device__ __forceinline__ explicit Team(const TeamSize& of)
      : size(of.threads),
        teams(of.teams(blockDim.x)),
        index(of.teams(threadIdx.x)),
        rank(threadIdx.x - index * size) {}

  // Floats of shared memory for a sum over up to 32 warps, or for two over up to 16.
  static constexpr int kRoom = 32;

  // Sums over the team, in an order that depends on nothing but its size. Every thread has them.
  // All threads of the block call it; two calls without a barrier between them have rooms of their
  // own.
  __device__ __forceinline__ float sum(float value, float* room) const {
    float values[1] = {value};
    sum_lanes(values);
    if (size <= 32) return values[0];
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = values[0];
    __syncthreads();
    const int first = index * (size / 32);
    float total = 0;
    for (int i = 0; i < size / 32; ++i) total += room[first + i];
    return total;
  }

  // Of N numbers, over a team of no more than a warp.
  template <int N>
  __device__ __forceinline__ void sum_lanes(float (&values)[N]) const {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
#pragma unroll
      for (float& value : values) {
        const float other = __shfl_xor_sync(0xffffffffu, value, offset);
        if (offset < size) value += other;
      }
    }
  }

  // Zeros in the part of a room that no warp writes: before the first sum_pair there.
  __device__ __forceinline__ static void clear(float* room) {
    const int written = 2 * (blockDim.x / 32);
    if (threadIdx.x < kRoom - written) room[written + threadIdx.x] = 0;
  }

  // Two of them at once.
  __device__ __forceinline__ float2 sum_pair(float a, float b, float* room) const {
    if (size <= 32) {
      float both[2] = {a, b};
      sum_lanes(both);
      return {both[0], both[1]};
    }
    // The lower half of a warp adds up a, the upper one b.
    const bool upper = threadIdx.x & 16;
    float value = upper ? b : a;
    value += __shfl_xor_sync(0xffffffffu, upper ? a : b, 16);
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) {
      value += __shfl_xor_sync(0xffffffffu, value, offset);
    }
    if (threadIdx.x % 16 == 0) room[threadIdx.x / 16] = value;
    __syncthreads();
    const float4* pairs = reinterpret_cast<const float4*>(room);
    if (size == 64) return sum_pairs<1>(pairs + index);
    return size <= 256 ? sum_pairs<4>(pairs) : sum_pairs<8>(pairs);
  }

 private:
  // Of 2 N warps.
  template <int N>
  __device__ __forceinline__ static float2 sum_pairs(const float4* pairs) {
    float4 total = pairs[0];
#pragma unroll
    for (int i = 1; i < N; ++i) {
      const float4 two = pairs[i];
      total.x += two.x, total.y += two.y;
      total.z += two.z, total.w += two.w;
    }
    return {total.x + total.z, total.y + total.w};
  }
};

}  // namespace diffit::cuda
