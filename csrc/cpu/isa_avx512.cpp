// The CPU kernels for AVX-512.
#include "cpu/includes.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif

#define DIFFIT_ISA avx512
#define DIFFIT_LANES 16
#include "cpu/all_kernels.h"

constexpr diffit::Kernels diffit::kAvx512Kernels = diffit::avx512::all_kernels("avx512");

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
