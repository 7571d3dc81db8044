// Sums of what blocks of threads left, in a fixed order.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/window.cuh"

namespace diffit::cuda {

constexpr int kSumThreads = 256;  // 8 warps, which share the parts of the same 32 columns

// part(p) summed over p < parts by the block, in each of its first 32 threads; others return 0.
// Warp w takes parts w, w + 8, ...
template <class Part>
__device__ __forceinline__ float sum_of_parts(int parts, const Part& part) {
  const int warp = threadIdx.x / 32;
  float sum = 0;
#pragma unroll 4
  for (int p = warp; p < parts; p += 8) sum += part(p);
  float* const sums = reinterpret_cast<float*>(shared_memory());  // (8, 32)
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0) return 0;
  for (int other = 1; other < 8; ++other) sum += sums[other * 32 + threadIdx.x];
  return sum;
}

struct SumParts {
  const float* parts;  // (samples, count, columns)
  int count, columns;
  void* out;  // (samples, columns)
  Number number;
};

// A block for 32 columns of a sample.
static __global__ void __launch_bounds__(kSumThreads)
    sum_parts_kernel(const __grid_constant__ SumParts arguments) {
  const int columns = arguments.columns, blocks = (columns + 31) / 32;
  const int column = blockIdx.x % blocks * 32 + threadIdx.x % 32;
  const int64_t sample = blockIdx.x / blocks;
  const bool valid = column < columns;
  const float* const from = arguments.parts + sample * arguments.count * columns + column;
  const float sum = sum_of_parts(valid ? arguments.count : 0,
                                 [&](int part) { return from[int64_t{part} * columns]; });
  if (valid && threadIdx.x < 32) {
    store_number(arguments.out, arguments.number, sample * columns + column, sum);
  }
}

}  // namespace diffit::cuda
