// The CPU kernels for AVX-512 with products of bfloat16 pairs.
#include "cpu/includes.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

#define DIFFIT_ISA avx512_bf16
#define DIFFIT_LANES 16
#define DIFFIT_BFLOAT16_DOT 1
#include "cpu/all_kernels.h"

constexpr diffit::Kernels diffit::kAvx512Bf16Kernels =
    diffit::avx512_bf16::all_kernels("avx512_bf16");

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
