// A small product of matrices, as kernels do them: copies into shared memory, ldmatrix, mma. With
// faults to plant in it.
#pragma once

#include <cmath>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/mma.cuh"

namespace diffit::cuda {

enum class Fault {
  kNone,
  kSwappedFragments,  // a[1] and a[2]
  kNoSync,            // after the copies
  kNoWait,            // for the copies
  kUnaligned,         // a row of ldmatrix
  kOutOfBounds,       // likewise
};

struct Product {
  const uint16_t *a, *b;  // (32, 64) and (64, 16)
  float* c;               // (32, 16)
  Fault fault;
};

constexpr int kStrideA = 72, kStrideB = 24;  // in shared memory: rows that meet no bank conflict
constexpr int kProductBytes = 2 * (32 * kStrideA + 64 * kStrideB);

// Two warps, of 16 rows each.
template <class E>
__global__ void __launch_bounds__(64) product_kernel(const __grid_constant__ Product args) {
  auto* a = reinterpret_cast<uint16_t*>(shared_memory());
  uint16_t* b = a + 32 * kStrideA;
  for (int i = threadIdx.x; i < 32 * 8; i += 64) {
    copy_async(a + i / 8 * kStrideA + i % 8 * 8, args.a + i * 8, true);
  }
  for (int i = threadIdx.x; i < 64 * 2; i += 64) {
    copy_async(b + i / 2 * kStrideB + i % 2 * 8, args.b + i * 8, true);
  }
  commit_copies();
  if (args.fault != Fault::kNoWait) wait_copies<0>();
  if (args.fault != Fault::kNoSync) __syncthreads();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float d[2][4] = {};
  for (int k = 0; k < 64; k += 16) {
    uint32_t fa[4], fb[4];
    const uint16_t* row = a + (16 * warp + lane % 16) * kStrideA + k + lane / 16 * 8;
    if (args.fault == Fault::kUnaligned && threadIdx.x == 37) row += 4;
    if (args.fault == Fault::kOutOfBounds && threadIdx.x == 37) row += 64 * kStrideA;
    load_matrices(fa, row);
    load_matrices_transposed(fb, b + (k + lane % 16) * kStrideB + lane / 16 * 8);
    if (args.fault == Fault::kSwappedFragments) {
      const uint32_t kept = fa[1];
      fa[1] = fa[2];
      fa[2] = kept;
    }
    mma<E>(d[0], fa, fb[0], fb[1]);
    mma<E>(d[1], fa, fb[2], fb[3]);
  }
  for (int n = 0; n < 2; ++n) {
    for (int i = 0; i < 4; ++i) {
      const int row = 16 * warp + lane / 4 + i / 2 * 8, column = 8 * n + lane % 4 * 2 + i % 2;
      args.c[row * 16 + column] = d[n][i];
    }
  }
}

// Small integers, whose products and sums are exact in every format.
template <class E>
std::vector<uint16_t> integers(int count) {
  std::vector<uint16_t> numbers(count);
  for (int i = 0; i < count; ++i) numbers[i] = rounded<E>(float(i * i % 23 - 11)).bits;
  return numbers;
}

// Throws unless c (M, N) is a (M, K) b (K, N).
template <class E>
void compare(const std::vector<float>& c, const std::vector<uint16_t>& a,
             const std::vector<uint16_t>& b, int columns, int inner) {
  for (size_t i = 0; i < c.size(); ++i) {
    float sum = 0;
    for (int k = 0; k < inner; ++k) {
      sum += to_float(E{a[i / columns * inner + k]}) * to_float(E{b[k * columns + i % columns]});
    }
    if (c[i] != sum) {
      throw std::runtime_error("wrong product: " + std::to_string(c[i]) + " at row " +
                               std::to_string(i / columns) + ", column " +
                               std::to_string(i % columns) + "; it is " + std::to_string(sum));
    }
  }
}

template <class E>
void check_product(Fault fault) {
  const auto a = integers<E>(32 * 64), b = integers<E>(64 * 16);
  std::vector<float> c(32 * 16);
  launch(product_kernel<E>, Product{a.data(), b.data(), c.data(), fault}, 1, 64, kProductBytes,
         nullptr, "product");
  compare<E>(c, a, b, 16, 64);
}

}  // namespace diffit::cuda
