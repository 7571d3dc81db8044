// The threads of a block that share a row, and their sums.
#pragma once

#include <cstdint>

namespace diffit::cuda {

// A team is a power of two of threads up to 32, or whole warps. A block has 128 threads, or less if
// they are one team, or one team of more.
struct Team {
  int size, index, rank;  // index among the block's teams, rank of this thread in it

  __device__ __forceinline__ explicit Team(int size)
      : size(size), index(threadIdx.x / size), rank(threadIdx.x - index * size) {}
  __device__ __forceinline__ int teams() const { return blockDim.x / size; }
  static constexpr int block_threads(int team) { return team < 128 ? 128 / team * team : team; }

  // Floats of shared memory for a sum over up to 32 warps, or for two over up to 16.
  static constexpr int kRoom = 32;

  // The sum over the team, in an order that depends on nothing but its size. Every thread has it.
  // All threads of the block call it; two calls without a barrier between them have rooms of their
  // own.
  __device__ __forceinline__ float sum(float value, float* room) const {
    value = sum_lanes(value);
    if (size <= 32) return value;
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = value;
    __syncthreads();
    const int first = index * (size / 32);
    value = 0;
    for (int i = 0; i < size / 32; ++i) value += room[first + i];
    return value;
  }

  // Zeros in the part of a room that no warp writes: before the first sum_pair there.
  __device__ __forceinline__ static void clear(float* room) {
    const int written = 2 * (blockDim.x / 32);
    if (threadIdx.x < kRoom - written) room[written + threadIdx.x] = 0;
  }

  // Two sums at once, likewise.
  __device__ __forceinline__ float2 sum_pair(float a, float b, float* room) const {
    if (size <= 32) return {sum_lanes(a), sum_lanes(b)};
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
  __device__ __forceinline__ float sum_lanes(float value) const {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, value, offset);
      if (offset < size) value += other;
    }
    return value;
  }

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
