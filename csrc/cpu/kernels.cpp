// The choice of an instruction set, once per process.
#include "cpu/kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace diffit {
namespace {

#if defined(__x86_64__)
// Leaf 7.1: not every compiler's __builtin_cpu_supports knows the name.
bool has_avx512_bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
}
#endif

struct Offer {
  const Kernels* kernels;
  bool runs;
};

const Kernels& choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const Offer offers[] = {
      {&kAvx512Bf16Kernels, avx512 && has_avx512_bf16()},
      {&kAvx512Kernels, avx512},
      {&kAvx2Kernels, avx2},
      {&kPortableKernels, true},
  };
#else
  const Offer offers[] = {{&kPortableKernels, true}};
#endif
  const char* limit = std::getenv("DIFFIT_CPU_CAPABILITY");
  bool allowed = limit == nullptr || *limit == '\0';
  for (const Offer& offer : offers) {
    allowed = allowed || std::string(limit) == offer.kernels->name;
    if (allowed && offer.runs) return *offer.kernels;
  }
  throw std::invalid_argument(
      "DIFFIT_CPU_CAPABILITY must be portable, avx2, avx512 or avx512_bf16, got '" +
      std::string(limit) + "'");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace diffit
