// Barriers in shared memory that count arrivals and bytes (sm_90: mbarrier), barriers of some of a
// block's warps, the fence between ordinary stores and the asynchronous proxy, and the hand-over of
// registers between warpgroups (sm_90a: setmaxnreg).
#pragma once

#include <cstdint>

#include "cuda/ptx/address.cuh"

namespace diffit::cuda {

// One thread; then fence_barriers() and a barrier of the block before anyone uses it.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes initialised barriers visible to the asynchronous proxy.
__device__ __forceinline__ void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// An arrival that also tells the barrier to expect so many bytes in this phase.
__device__ __forceinline__ void barrier_arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Returns when the phase of this parity is over: 0 for the first, then 1, 0, ... Parity 1 of a new
// barrier is over.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{.reg .pred done;\n"
      "waiting: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra waiting;\n"
      "finished: }" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Ordinary stores of this thread to shared memory, before; the asynchronous proxy's reads (wgmma,
// TMA), after.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A barrier of `threads` threads, whole warps; `id` is 1 to 15 (0 is __syncthreads).
__device__ __forceinline__ void sync_some(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The warpgroup gives registers back, or waits for more, to have `kCount` a thread.
template <int kCount>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace diffit::cuda
