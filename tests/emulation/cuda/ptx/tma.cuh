// Twin of csrc/cuda/ptx/tma.cuh. The work is done in tma.cpp.
#pragma once

#include <cstdint>

#include "cuda/ptx/address.cuh"

namespace diffit::cuda {

// Of a tensor of 2-byte numbers: sizes, strides in bytes, and the box; innermost first.
struct alignas(64) TensorMap {
  unsigned char* data;
  int64_t sizes[4], strides[4];
  int box[4];
  int swizzle;
  uint32_t mark;  // of one that tensor_map() has made
};

}  // namespace diffit::cuda

namespace diffit::emulation {

constexpr uint32_t kTensorMapMark = 0x7e45035a;

void check_map(const cuda::TensorMap& map, const char* name, Location where);
void copy_box(void* to, const cuda::TensorMap& map, uint64_t* barrier, int c, int x, int y, int b,
              Location where);
void copy_bytes(void* to, const void* from, int bytes, uint64_t* barrier, Location where);
void store_box(const cuda::TensorMap& map, const void* from, int c, int x, int y, int b,
               Location where);
void commit_stores(Location where);
void wait_stores_read(Location where);

}  // namespace diffit::emulation

namespace diffit::cuda {

inline void prefetch_map(const TensorMap& map,
                         emulation::Location where = emulation::Location::current()) {
  emulation::check_map(map, "prefetch_map", where);
}

// The destination is NaN until the bytes arrive, as late or as early as the order of threads says.
inline void copy_box(void* to, const TensorMap& map, uint64_t* barrier, int c, int x, int y, int b,
                     emulation::Location where = emulation::Location::current()) {
  emulation::copy_box(to, map, barrier, c, x, y, b, where);
}

inline void copy_bytes(void* to, const void* from, int bytes, uint64_t* barrier,
                       emulation::Location where = emulation::Location::current()) {
  emulation::copy_bytes(to, from, bytes, barrier, where);
}

inline void store_box(const TensorMap& map, const void* from, int c, int x, int y, int b,
                      emulation::Location where = emulation::Location::current()) {
  emulation::store_box(map, from, c, x, y, b, where);
}

inline void commit_stores(emulation::Location where = emulation::Location::current()) {
  emulation::commit_stores(where);
}

// A store reads shared memory, and writes, as late or as early as the order of threads says.
inline void wait_stores_read(emulation::Location where = emulation::Location::current()) {
  emulation::wait_stores_read(where);
}

}  // namespace diffit::cuda
