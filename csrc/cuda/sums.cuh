// Sums of what blocks of threads left, in a fixed order.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/window_attention_backward.cuh"

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

// dtable from the parts of all pairs of tiles: blockIdx (rows of the table / 32, head).
static __global__ void __launch_bounds__(kSumThreads)
    sum_table_kernel(const __grid_constant__ BackwardArguments arguments) {
  const Windows& windows = arguments.windows;
  const int heads = arguments.a.heads, head = blockIdx.y;
  const int row = blockIdx.x * 32 + threadIdx.x % 32;
  const int across = 2 * windows.width - 1, dy = row / across - (windows.height - 1);
  const int tiles = window_tiles(windows), pairs = tiles * tiles, offsets = pair_offsets(windows);
  const bool valid = row < windows.table_size();
  const float sum = sum_of_parts(valid ? arguments.walk.splits * pairs : 0, [&](int part) {
    const int split = part / pairs, pair = part % pairs;
    const int down = dy - first_difference(windows, pair / tiles, pair % tiles);
    const int offset = down * across + row % across;
    if (down < 0 || offset >= offsets) return 0.f;
    const int64_t at = (int64_t{split} * heads + head) * pairs + pair;
    return arguments.dtable_parts[at * offsets + offset];
  });
  if (valid && threadIdx.x < 32) {
    const Input& table = arguments.a.table;
    store_number(arguments.a.dtable, table.number, int64_t{row} * heads + head, sum);
  }
}

}  // namespace diffit::cuda
