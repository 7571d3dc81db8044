// Twin of csrc/cuda/ptx/barrier.cuh. The work is done in barrier.cpp.
#pragma once

#include <cstdint>

#include "cuda/ptx/address.cuh"

namespace diffit::emulation {

void init_barrier(uint64_t* barrier, int arrivals, Location where);
void fence_barriers();
void arrive(uint64_t* barrier, int bytes, const char* name, Location where);
void wait_for_phase(uint64_t* barrier, int parity, Location where);
void set_registers(int count, bool more, const char* name, Location where);

// Of a copy into shared memory whose bytes count for a barrier: it has been asked for; its bytes
// are there.
void begin_copy(uint64_t* barrier, int bytes, Location where);
void end_copy(uint64_t* barrier, int bytes, Location where);

// Shared memory as the asynchronous proxy (the copy engine, wgmma) sees it: without the ordinary
// stores that no fence has made known to it. Whatever any thread has stored counts as known after
// the fence of any thread.
unsigned char* asynchronous_view();
void fence_async_proxy();

}  // namespace diffit::emulation

namespace diffit::cuda {

inline void barrier_init(uint64_t* barrier, int arrivals,
                         emulation::Location where = emulation::Location::current()) {
  emulation::init_barrier(barrier, arrivals, where);
}

inline void fence_barriers() { emulation::fence_barriers(); }

inline void barrier_arrive(uint64_t* barrier,
                           emulation::Location where = emulation::Location::current()) {
  emulation::arrive(barrier, 0, "barrier_arrive", where);
}

inline void barrier_arrive_expecting(uint64_t* barrier, int bytes,
                                     emulation::Location where = emulation::Location::current()) {
  emulation::arrive(barrier, bytes, "barrier_arrive_expecting", where);
}

inline void barrier_wait(uint64_t* barrier, int parity,
                         emulation::Location where = emulation::Location::current()) {
  emulation::wait_for_phase(barrier, parity, where);
}

inline void fence_async_proxy() { emulation::fence_async_proxy(); }

inline void sync_some(int id, int threads,
                      emulation::Location where = emulation::Location::current()) {
  if (id == 0) emulation::fail("sync_some of barrier 0, which is __syncthreads", where);
  emulation::barrier(id, threads, where);
}

template <int kCount>
void give_registers(emulation::Location where = emulation::Location::current()) {
  emulation::set_registers(kCount, false, "give_registers", where);
}

template <int kCount>
void take_registers(emulation::Location where = emulation::Location::current()) {
  emulation::set_registers(kCount, true, "take_registers", where);
}

}  // namespace diffit::cuda
