// Tiles of tokens in shared memory, and a warp's products with them. A tile has a row of D numbers
// for each token. Rows are an odd number of 16-byte chunks apart, so that the 8 rows of a matrix
// that ldmatrix reads lie in different banks.
#pragma once

#include <cstdint>

#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/mma.cuh"

namespace diffit::cuda {

template <int D>
struct Tile {
  static constexpr int kChunks = D / 8;
  static constexpr int kRow = (kChunks | 1) * 16;  // bytes
  static constexpr int bytes(int rows) { return rows * kRow; }
};

// 16 rows of a warp's matrix A, as mma takes it: rows of D numbers, in steps of 16 and, where D is
// 72, one of 8.
template <int D>
struct Rows {
  uint32_t whole[D / 16][4];
  uint32_t half[2];

  // The lane's two numbers of a block of 8 columns, in row g or g + 8; all known when compiled.
  __device__ __forceinline__ uint32_t& at(int block, int lower) {
    return block < D / 16 * 2 ? whole[block / 2][block % 2 * 2 + lower] : half[lower];
  }
};

template <int D>
__device__ __forceinline__ void load_rows(Rows<D>& rows, const unsigned char* tile, int first) {
  const int lane = threadIdx.x % 32;
  const unsigned char* at = tile + (first + lane % 16) * Tile<D>::kRow + lane / 16 * 16;
#pragma unroll
  for (int k = 0; k < D / 16; ++k) load_matrices(rows.whole[k], at + 32 * k);
  if constexpr (D % 16 != 0) {
    uint32_t last[4];  // the second half is the first once more, and not used
    load_matrices(last, at + 32 * (D / 16) - lane / 16 * 16);
    rows.half[0] = last[0], rows.half[1] = last[1];
  }
}

// acc[m] (16, 8 N) += a[m] (16, D) times the transpose of rows `first` to `first` + 8 N of the
// tile.
template <class E, int D, int M, int N>
__device__ __forceinline__ void multiply_transposed(float (&acc)[M][N][4], const Rows<D> (&a)[M],
                                                    const unsigned char* tile, int first) {
  static_assert(N % 2 == 0);
  const int lane = threadIdx.x % 32;
  const unsigned char* at =
      tile + (first + lane % 8 + lane / 16 * 8) * Tile<D>::kRow + lane / 8 % 2 * 16;
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[4];
      load_matrices(b, at + 8 * n * Tile<D>::kRow + 32 * k);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma<E>(acc[m][n], a[m].whole[k], b[0], b[1]);
        mma<E>(acc[m][n + 1], a[m].whole[k], b[2], b[3]);
      }
    }
  }
  if constexpr (D % 16 != 0) {
    constexpr int kStep = N % 4 == 0 ? 4 : 2;  // blocks of 8 rows that one instruction loads
    at = tile + (first + lane % (8 * kStep)) * Tile<D>::kRow + 32 * (D / 16);
#pragma unroll
    for (int n = 0; n < N; n += kStep) {
      uint32_t b[4];
      load_matrices(b, at + 8 * n * Tile<D>::kRow);
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          mma_half<E>(acc[m][n + i], a[m].half[0], a[m].half[1], b[i]);
        }
      }
    }
  }
}

// acc[m] (16, D) += a[m] (16, 16 K) times rows `first` to `first` + 16 K of the tile.
template <class E, int D, int M, int K>
__device__ __forceinline__ void multiply(float (&acc)[M][D / 8][4], const uint32_t (&a)[M][K][4],
                                         const unsigned char* tile, int first) {
  const int lane = threadIdx.x % 32;
  const unsigned char* at = tile + (first + lane % 16) * Tile<D>::kRow + lane / 16 * 16;
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int n = 0; n + 1 < D / 8; n += 2) {
      uint32_t b[4];
      load_matrices_transposed(b, at + 16 * k * Tile<D>::kRow + 16 * n);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma<E>(acc[m][n], a[m][k], b[0], b[1]);
        mma<E>(acc[m][n + 1], a[m][k], b[2], b[3]);
      }
    }
  }
  if constexpr (D % 16 != 0) {
    constexpr int kLast = D / 8 - 1, kStep = K % 2 == 0 ? 2 : 1;  // sixteens of rows a load
    at = tile + (first + lane % (16 * kStep)) * Tile<D>::kRow + 16 * kLast;
#pragma unroll
    for (int k = 0; k < K; k += kStep) {
      uint32_t b[4];
      load_matrices_transposed(b, at + 16 * k * Tile<D>::kRow);
#pragma unroll
      for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int i = 0; i < kStep; ++i) mma<E>(acc[m][kLast], a[m][k + i], b[2 * i], b[2 * i + 1]);
      }
    }
  }
}

template <int N>
__device__ __forceinline__ void scale_sums(float (&acc)[N][4], float factor) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[n][i] *= factor;
  }
}

// A product's results as the next one's A: rounded, and in the same lanes.
template <class E, int N>
__device__ __forceinline__ void to_rows(uint32_t (&a)[N / 2][4], const float (&acc)[N][4]) {
#pragma unroll
  for (int k = 0; k < N / 2; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* from = acc[2 * k + i / 2];
      a[k][i] = pack<E>(from[2 * (i % 2)], from[2 * (i % 2) + 1]);
    }
  }
}

// Sum, or maximum, over the four lanes that share a row.
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// Starts copying `kRows` rows of D numbers into each of kTiles tiles. Row r comes from row
// `row_of(r)` of from[i], whose rows are `stride` numbers apart; it is zero where that is negative.
template <class E, int D, int kRows, int kThreads, int kTiles, class RowOf>
__device__ __forceinline__ void copy_rows(unsigned char* const (&tiles)[kTiles],
                                          const E* const (&from)[kTiles], int stride,
                                          const RowOf& row_of) {
  constexpr int kChunks = Tile<D>::kChunks;
#pragma unroll 2
  for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const int64_t source = row_of(row);
    const int64_t at = (source < 0 ? 0 : source) * stride + 8 * chunk;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      copy_async(tiles[tile] + row * Tile<D>::kRow + 16 * chunk, from[tile] + at, source >= 0);
    }
  }
}

// Stores a warp's (16, D) results, rounded: row g at `upper` and row g + 8 at `lower`, each unless
// it is null. The four lanes of a row hold 2 numbers of every 8; they exchange them, so that each
// stores 16 bytes of its own.
template <class E, int N>
__device__ __forceinline__ void store_rows(const float (&acc)[N][4], E* upper, E* lower) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    E* to = half ? lower : upper;
#pragma unroll
    for (int n = 0; n + 3 < N; n += 4) {
      uint32_t w[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        w[i] = pack<E>(acc[n + i][2 * half], acc[n + i][2 * half + 1]);
      }
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint32_t got = __shfl_xor_sync(0xffffffffu, t & 1 ? w[i] : w[i + 1], 1);
        (t & 1 ? w[i] : w[i + 1]) = got;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t got = __shfl_xor_sync(0xffffffffu, t & 2 ? w[i] : w[i + 2], 2);
        (t & 2 ? w[i] : w[i + 2]) = got;
      }
      if (to) *reinterpret_cast<uint4*>(to + 8 * (n + t)) = make_uint4(w[0], w[1], w[2], w[3]);
    }
#pragma unroll
    for (int n = N / 4 * 4; n < N; ++n) {
      const uint32_t both = pack<E>(acc[n][2 * half], acc[n][2 * half + 1]);
      if (to) *reinterpret_cast<uint32_t*>(to + 8 * n + 2 * t) = both;
    }
  }
}

}  // namespace diffit::cuda
