// Products of a warpgroup: 128 threads multiply matrices of which at least one lies in shared
// memory, while they do other things (sm_90a: wgmma). Thread 32 w + 4 g + t of the group holds of D
// (64, N)
//
//     d[4 n + 0, 1] = D[16 w + g][8 n + 2t..]        d[4 n + 2, 3] = D[16 w + g + 8][8 n + 2t..]
//
// and of an A (64, 16) in registers what mma.cuh says for rows 16 w to 16 w + 15.
#pragma once

#include <cstdint>

#include "cuda/ptx/address.cuh"
#include "cuda/ptx/numbers.cuh"

namespace diffit::cuda {

// Before the first product, and after registers that a product takes were written.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Ends a group of this warpgroup's products.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until all but the last `kPending` groups are done: their D may be read, their A and B
// written over.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Registers that products take or make: what is written to them before stays before, what is read
// of them after stays after, and they are not given to anything else until here. To be called
// between the writes and wgmma_fence(), and after the wgmma_wait() for the products, for A too.
template <int N>
__device__ __forceinline__ void hold(float (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int N, int M>
__device__ __forceinline__ void hold(uint32_t (&registers)[N][M]) {
#pragma unroll
  for (int i = 0; i < N * M; ++i) asm volatile("" : "+r"(registers[i / M][i % M])::"memory");
}

// Where a chunk of 16 bytes lies within its row: with k128, rows are 128 bytes, and the number of
// the chunk is xored with address / 128 % 8 (the row, if the matrix is aligned to 1024); with k64,
// rows are 64 bytes, and it is xored with address / 128 % 4 (aligned to 512).
enum class Swizzle : int { kNone = 0, k128 = 1, k64 = 2 };

// A matrix in shared memory, seen from its first element; `leading` and `stride` are in bytes,
// multiples of 16 below 2^18. "Lines" are what lies on end.
//
//   K-major (a line has consecutive k's; lines go along m or n): the two chunks of 8 k's of a line
//     kNone: 8 lines of one chunk are 128 bytes on end; `stride` to the next 8 lines, `leading` to
//            the next chunk, wherever that is
//     k128, k64: lines are rows of 128 or 64 bytes; `stride` to the next 8 lines; `leading` unused
//   MN-major (a line has consecutive m's or n's; 16 lines, one for each k)
//     kNone: 8 lines of one chunk are 128 bytes on end; `leading` to the next 8 k's, `stride` to
//            the next chunk of 8 m's or n's
//     k128, k64: lines are rows of 64 or 32 m's or n's; `stride` to the next 8 k's, `leading` to
//            the next 64 or 32 m's or n's
//
// A swizzled matrix may begin at any chunk of the first of 8 lines of an aligned one: 16 k's on is
// 32 bytes on. The swizzle is a permutation of addresses, so that is all there is to it.
__device__ __forceinline__ uint64_t matrix(const void* data, int leading, int stride,
                                           Swizzle swizzle) {
  return uint64_t((shared_address(data) & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 |
         uint64_t(stride >> 4) << 32 | uint64_t(swizzle) << 62;
}

// The same matrix, `bytes` (a multiple of 16) further on.
__device__ __forceinline__ uint64_t moved(uint64_t matrix, int bytes) {
  return (matrix & 0xffffffff00000000u) | uint32_t(uint32_t(matrix) + (bytes >> 4));
}

// D = A B + (add ? D : 0), for 16 k's: A (64, 16) and B (16, N) in shared memory, or A in
// registers. A and B are K-major; kMajorB = 1 says that B is N-major.
template <class E, int N, int kMajorB = 0>
struct Wgmma;

#define DIFFIT_REGISTERS_8 "{%0, %1, %2, %3}"
#define DIFFIT_D_8 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define DIFFIT_REGISTERS_32 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"
#define DIFFIT_D_32                                                                               \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),    \
      "+f"(d[15])
#define DIFFIT_REGISTERS_64                                                 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define DIFFIT_D_64                                                                               \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),    \
      "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),  \
      "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),  \
      "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define DIFFIT_REGISTERS_72                                                          \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35}"
#define DIFFIT_D_72                                                                               \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),    \
      "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),  \
      "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),  \
      "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define DIFFIT_REGISTERS_96                                                          \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}"
#define DIFFIT_D_96                                                                               \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),    \
      "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),  \
      "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),  \
      "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),  \
      "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]),  \
      "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define DIFFIT_REGISTERS_128                                                         \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define DIFFIT_D_128                                                                              \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
      "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),    \
      "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),  \
      "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),  \
      "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),  \
      "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]),  \
      "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]),  \
      "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),  \
      "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define DIFFIT_NEXT_8 "10"
#define DIFFIT_NEXT_32 "22"
#define DIFFIT_NEXT_64 "38"
#define DIFFIT_NEXT_72 "42"
#define DIFFIT_NEXT_96 "54"
#define DIFFIT_NEXT_128 "70"

#define DIFFIT_WGMMA(ELEMENT, TYPE, N, I0, I1, I2, I3, I4, I5)                                     \
  template <int kMajorB>                                                                           \
  struct Wgmma<ELEMENT, N, kMajorB> {                                                              \
    static __device__ __forceinline__ void run(float (&d)[N / 2], uint64_t a, uint64_t b,          \
                                               bool add) {                                         \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" I2                                            \
                   ", 0; "                                                                         \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                 \
                   " " DIFFIT_REGISTERS_##N ", %" I0 ", %" I1 ", p, 1, 1, 0, %" I3 ";}"            \
                   : DIFFIT_D_##N                                                                  \
                   : "l"(a), "l"(b), "r"(int(add)), "n"(kMajorB));                                 \
    }                                                                                              \
    static __device__ __forceinline__ void run(float (&d)[N / 2], const uint32_t (&a)[4],          \
                                               uint64_t b, bool add) {                             \
      asm volatile(                                                                                \
          "{.reg .pred p; setp.ne.b32 p, %" I5                                                     \
          ", 0; "                                                                                  \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " " DIFFIT_REGISTERS_##N \
          ", {%" I0 ", %" I1 ", %" I2 ", %" I3 "}, %" I4 ", p, 1, 1, %" DIFFIT_NEXT_##N ";}"       \
          : DIFFIT_D_##N                                                                           \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(kMajorB));      \
    }                                                                                              \
  };

DIFFIT_WGMMA(BFloat16, "bf16", 8, "4", "5", "6", "7", "8", "9")
DIFFIT_WGMMA(Float16, "f16", 8, "4", "5", "6", "7", "8", "9")
DIFFIT_WGMMA(BFloat16, "bf16", 32, "16", "17", "18", "19", "20", "21")
DIFFIT_WGMMA(Float16, "f16", 32, "16", "17", "18", "19", "20", "21")
DIFFIT_WGMMA(BFloat16, "bf16", 64, "32", "33", "34", "35", "36", "37")
DIFFIT_WGMMA(Float16, "f16", 64, "32", "33", "34", "35", "36", "37")
DIFFIT_WGMMA(BFloat16, "bf16", 72, "36", "37", "38", "39", "40", "41")
DIFFIT_WGMMA(Float16, "f16", 72, "36", "37", "38", "39", "40", "41")
DIFFIT_WGMMA(BFloat16, "bf16", 96, "48", "49", "50", "51", "52", "53")
DIFFIT_WGMMA(Float16, "f16", 96, "48", "49", "50", "51", "52", "53")
DIFFIT_WGMMA(BFloat16, "bf16", 128, "64", "65", "66", "67", "68", "69")
DIFFIT_WGMMA(Float16, "f16", 128, "64", "65", "66", "67", "68", "69")
#undef DIFFIT_WGMMA
#undef DIFFIT_REGISTERS_8
#undef DIFFIT_D_8
#undef DIFFIT_NEXT_8
#undef DIFFIT_REGISTERS_32
#undef DIFFIT_D_32
#undef DIFFIT_NEXT_32
#undef DIFFIT_REGISTERS_64
#undef DIFFIT_D_64
#undef DIFFIT_NEXT_64
#undef DIFFIT_REGISTERS_72
#undef DIFFIT_D_72
#undef DIFFIT_NEXT_72
#undef DIFFIT_REGISTERS_96
#undef DIFFIT_D_96
#undef DIFFIT_NEXT_96
#undef DIFFIT_REGISTERS_128
#undef DIFFIT_D_128
#undef DIFFIT_NEXT_128

}  // namespace diffit::cuda
