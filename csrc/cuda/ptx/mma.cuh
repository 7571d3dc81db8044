// Products of a warp's matrix fragments (sm_80: mma.sync, ldmatrix). In lane 4 g + t of a warp,
// with pairs (low, high) of neighbouring columns of A, or of neighbouring rows of B, in a register:
//
//     a[0] = A[g][2t..]   a[1] = A[g + 8][2t..]   a[2] = A[g][2t + 8..]   a[3] = A[g + 8][2t + 8..]
//     b[0] = B[2t..][g]   b[1] = B[2t + 8..][g]
//     d[0], d[1] = D[g][2t..]                     d[2], d[3] = D[g + 8][2t..]
#pragma once

#include <cstdint>

#include "cuda/ptx/address.cuh"
#include "cuda/ptx/numbers.cuh"

namespace diffit::cuda {

// D (16, 8) += A (16, 16) B (16, 8), with sums in float32.
template <class E>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1);

// D (16, 8) += A (16, 8) B (8, 8): a[0], a[1] and b[0] of the above.
template <class E>
__device__ __forceinline__ void mma_half(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0);

#define DIFFIT_MMA(ELEMENT, TYPE)                                                                  \
  template <>                                                                                      \
  __device__ __forceinline__ void mma<ELEMENT>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, \
                                               uint32_t b1) {                                      \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                     \
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                     \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                           \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                           \
  }                                                                                                \
  template <>                                                                                      \
  __device__ __forceinline__ void mma_half<ELEMENT>(float (&d)[4], uint32_t a0, uint32_t a1,       \
                                                    uint32_t b0) {                                 \
    asm("mma.sync.aligned.m16n8k8.row.col.f32." TYPE "." TYPE                                      \
        ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"                                 \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                           \
        : "r"(a0), "r"(a1), "r"(b0));                                                              \
  }
DIFFIT_MMA(BFloat16, "bf16")
DIFFIT_MMA(Float16, "f16")
#undef DIFFIT_MMA

// Four 8 x 8 matrices of 16-bit numbers: lane 8 m + r gives the address of row r (16 bytes,
// aligned) of matrix m, and r[m] of lane 4 g + t becomes numbers 2t and 2t + 1 of row g of matrix
// m.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of each matrix transposed: r[m] becomes numbers g of rows 2t and 2t + 1 of matrix m.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The reverse of load_matrices: r[m] of lane 4 g + t becomes numbers 2t and 2t + 1 of row g of
// matrix m, whose row r is where lane 8 m + r says (sm_90: stmatrix).
__device__ __forceinline__ void store_matrices(void* row, const uint32_t (&r)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
}

// Two matrices: the addresses of lanes 0 to 15 count.
__device__ __forceinline__ void store_matrices(void* row, const uint32_t (&r)[2]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(row)),
      "r"(r[0]), "r"(r[1])
      : "memory");
}

}  // namespace diffit::cuda
