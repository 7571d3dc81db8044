// The CPU kernels for vectors of 4 floats, which every 64-bit processor has (SSE2, NEON).
#include "cpu/includes.h"

#define DIFFIT_ISA portable
#define DIFFIT_LANES 4
#include "cpu/all_kernels.h"

constexpr diffit::Kernels diffit::kPortableKernels = diffit::portable::all_kernels("portable");
