// What the compiler knows about registers.
#pragma once

#include <cstdint>

namespace diffit::cuda {

// Makes the compiler forget what it knows of a value: what was computed from it is computed again
// where it is needed again, instead of being kept in registers of its own.
__device__ __forceinline__ void forget(uint32_t& value) { asm volatile("" : "+r"(value)); }

__device__ __forceinline__ void forget(int64_t& value) {
  uint32_t low = static_cast<uint32_t>(value), high = static_cast<uint32_t>(value >> 32);
  forget(low), forget(high);
  value = static_cast<int64_t>(uint64_t{high} << 32 | low);
}

}  // namespace diffit::cuda
