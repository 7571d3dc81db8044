// What nvcc has built in, for kernels that g++ compiles: included before a kernel's first line
// (-include emulation.h). Kernels use nothing else of CUDA but the headers in csrc/cuda/, whose
// twins of the same names are found first (-Itests/emulation -Icsrc).
#pragma once

#include <math.h>

#include <bit>
#include <cstdint>
#include <cstring>

#include "device.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

// Of the thread that runs: changed whenever threads take turns.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }

// Of a NaN and a number, the smaller and the larger are the number.
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
#define DIFFIT_MIN_MAX(TYPE)                                   \
  constexpr TYPE min(TYPE a, TYPE b) { return b < a ? b : a; } \
  constexpr TYPE max(TYPE a, TYPE b) { return a < b ? b : a; }
DIFFIT_MIN_MAX(int)
DIFFIT_MIN_MAX(unsigned)
DIFFIT_MIN_MAX(long)
DIFFIT_MIN_MAX(long long)
DIFFIT_MIN_MAX(unsigned long)
DIFFIT_MIN_MAX(unsigned long long)
#undef DIFFIT_MIN_MAX

inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fdividef(float x, float y) { return x / y; }

template <class T>
T __ldg(const T* from) {
  return *from;
}

inline void __syncthreads(diffit::emulation::Location where = std::source_location::current()) {
  diffit::emulation::barrier(0, blockDim.x, where);
}

namespace diffit::emulation {

// Fails unless all lanes take part: our kernels ask for no less.
void check_mask(unsigned mask, const char* name, Location where);

void sync_warp(Location where);
enum class Shuffle { kIndex, kUp, kDown, kXor };
// 32 or 64 bits, of the lane that the arguments name, as the PTX ISA has it for shfl.sync.
uint64_t shuffle(Shuffle, const char* name, uint64_t value, int argument, int width,
                 Location where);
unsigned ballot(const char* name, bool vote, Location where);

template <class T>
T shuffle_as(Shuffle kind, const char* name, unsigned mask, T value, int argument, int width,
             Location where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  check_mask(mask, name, where);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, name, bits, argument, width, where);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace diffit::emulation

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       diffit::emulation::Location where = std::source_location::current()) {
  diffit::emulation::check_mask(mask, "__syncwarp", where);
  diffit::emulation::sync_warp(where);
}

#define DIFFIT_SHUFFLE(NAME, KIND)                                                             \
  template <class T>                                                                           \
  T NAME(unsigned mask, T value, int argument, int width = 32,                                 \
         diffit::emulation::Location where = std::source_location::current()) {                \
    return diffit::emulation::shuffle_as(diffit::emulation::Shuffle::KIND, #NAME, mask, value, \
                                         argument, width, where);                              \
  }
DIFFIT_SHUFFLE(__shfl_sync, kIndex)
DIFFIT_SHUFFLE(__shfl_up_sync, kUp)
DIFFIT_SHUFFLE(__shfl_down_sync, kDown)
DIFFIT_SHUFFLE(__shfl_xor_sync, kXor)
#undef DIFFIT_SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int vote,
                              diffit::emulation::Location where = std::source_location::current()) {
  diffit::emulation::check_mask(mask, "__ballot_sync", where);
  return diffit::emulation::ballot("__ballot_sync", vote != 0, where);
}
inline int __any_sync(unsigned mask, int vote,
                      diffit::emulation::Location where = std::source_location::current()) {
  diffit::emulation::check_mask(mask, "__any_sync", where);
  return diffit::emulation::ballot("__any_sync", vote != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int vote,
                      diffit::emulation::Location where = std::source_location::current()) {
  diffit::emulation::check_mask(mask, "__all_sync", where);
  return diffit::emulation::ballot("__all_sync", vote != 0, where) == 0xffffffffu;
}
