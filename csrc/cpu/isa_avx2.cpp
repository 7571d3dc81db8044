// The CPU kernels for AVX2 with FMA and F16C.
#include "cpu/includes.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define DIFFIT_ISA avx2
#define DIFFIT_LANES 8
#include "cpu/all_kernels.h"

constexpr diffit::Kernels diffit::kAvx2Kernels = diffit::avx2::all_kernels("avx2");

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
