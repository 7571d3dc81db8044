// Where something lies in a block's shared memory, as instructions take it.
#pragma once

#include <cstdint>

namespace diffit::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace diffit::cuda
