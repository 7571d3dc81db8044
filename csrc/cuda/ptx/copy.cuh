// Copies from device memory to shared memory that go on while the thread does (sm_80: cp.async).
#pragma once

#include <cstdint>

#include "cuda/ptx/address.cuh"
namespace diffit::cuda {

// 16 bytes; both addresses are multiples of 16. Where not `valid`, zeros are written and `from`,
// which must still be an address, is not read.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

// The same of 4 bytes, and addresses that are multiples of 4.
__device__ __forceinline__ void copy_async_4(void* to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 4 : 0)
               : "memory");
}

// Ends a group of this thread's copies, which may be empty.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all but the last `kPending` groups of this thread's copies have arrived. Other
// threads see them after a barrier.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace diffit::cuda
