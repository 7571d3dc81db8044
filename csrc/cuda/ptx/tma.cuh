// Boxes of a tensor in device memory, copied to shared memory and back by the copy engine (sm_90:
// TMA). In shared memory a box is dense, channels innermost, then columns, then rows; with a
// swizzle its chunks are permuted as wgmma.cuh says.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/ptx/address.cuh"

namespace diffit::cuda {

using TensorMap = CUtensorMap;

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// One thread: the box of the map at channel `c`, column `x`, row `y`, sample `b` of a (B, H, W, C)
// tensor. Its bytes count for the barrier when they have arrived. What lies outside the tensor is
// zero. `to` is aligned to 128 bytes, to 1024 for a swizzle of 128, to 512 for one of 64.
__device__ __forceinline__ void copy_box(void* to, const TensorMap& map, uint64_t* barrier, int c,
                                         int x, int y, int b) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c), "r"(x), "r"(y), "r"(b)
      : "memory");
}

// One thread: so many bytes on end, likewise. These, and both addresses, are multiples of 16.
__device__ __forceinline__ void copy_bytes(void* to, const void* from, int bytes,
                                           uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// One thread: a box, from shared memory to the tensor. What was stored to shared memory
// before must have been fenced by fence_async_proxy() in the threads that did.
__device__ __forceinline__ void store_box(const TensorMap& map, const void* from, int c, int x,
                                          int y, int b) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          &map),
      "r"(shared_address(from)), "r"(c), "r"(x), "r"(y), "r"(b)
      : "memory");
}

// Ends a group of this thread's stores.
__device__ __forceinline__ void commit_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until this thread's stores have been read from shared memory, which may then be written
// over, or given up at the end of the kernel.
__device__ __forceinline__ void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

}  // namespace diffit::cuda
