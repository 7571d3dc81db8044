// Twin of csrc/cuda/ptx/mma.cuh. The work is done in warp.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/ptx/address.cuh"
#include "cuda/ptx/numbers.cuh"

namespace diffit::cuda {

// A lane's part of a product.
struct Fragments {
  float* d;
  uint32_t a[4], b[2];
};

}  // namespace diffit::cuda

namespace diffit::emulation {

template <class E>
void multiply_fragments(cuda::Fragments& fragments, bool half, const char* name, Location where);
void load_matrices(uint32_t (&r)[4], const void* row, bool transposed, Location where);
void store_matrices(void* row, const uint32_t* r, int matrices, Location where);
// Of `count` matrices; the addresses of the first 8 `count` lanes count.
void store_matrices(void* row, const uint32_t* r, int count, Location where);

}  // namespace diffit::emulation

namespace diffit::cuda {

template <class E>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
         emulation::Location where = emulation::Location::current()) {
  Fragments fragments{d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulation::multiply_fragments<E>(fragments, false, "mma", where);
}

template <class E>
void mma_half(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0,
              emulation::Location where = emulation::Location::current()) {
  Fragments fragments{d, {a0, a1}, {b0}};
  emulation::multiply_fragments<E>(fragments, true, "mma_half", where);
}

inline void load_matrices(uint32_t (&r)[4], const void* row,
                          emulation::Location where = emulation::Location::current()) {
  emulation::load_matrices(r, row, false, where);
}

inline void load_matrices_transposed(uint32_t (&r)[4], const void* row,
                                     emulation::Location where = emulation::Location::current()) {
  emulation::load_matrices(r, row, true, where);
}

inline void store_matrices(void* row, const uint32_t (&r)[4],
                           emulation::Location where = emulation::Location::current()) {
  emulation::store_matrices(row, r, 4, where);
}

inline void store_matrices(void* row, const uint32_t (&r)[2],
                           emulation::Location where = emulation::Location::current()) {
  emulation::store_matrices(row, r, 2, where);
}

template <size_t kMatrices>
void store_matrices(void* row, const uint32_t (&r)[kMatrices],
                    emulation::Location where = emulation::Location::current()) {
  static_assert(kMatrices == 4 || kMatrices == 2);
  emulation::store_matrices(row, r, kMatrices, where);
}

}  // namespace diffit::cuda
