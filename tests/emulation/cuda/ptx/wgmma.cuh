// Twin of csrc/cuda/ptx/wgmma.cuh. A product is done as late as it may: when its group is waited
// for. Until then D is NaN, and A's registers and shared memory must stay as they are. With
// DIFFIT_EMULATION_WGMMA=early in the environment it is done at once. The work is done in
// wgmma.cpp.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/ptx/address.cuh"
#include "cuda/ptx/numbers.cuh"

namespace diffit::emulation {

// D (64, n) = A (64, 16) B (16, n) + (add ? D : 0). A comes from registers if a_registers is not
// null; d and a_registers are this thread's.
struct Product {
  const float* numbers;  // the table of the elements' values by their bits
  int n;
  bool n_major, add;
  uint64_t a, b;
  float* d;
  const uint32_t* a_registers;
};

template <class E>
const float* number_table() {
  static const float* const table = [] {
    float* numbers = new float[1 << 16];
    for (int bits = 0; bits < 1 << 16; ++bits) numbers[bits] = cuda::to_float(E{uint16_t(bits)});
    return numbers;
  }();
  return table;
}

void fence_products(Location where);
void multiply(const Product& product, Location where);
void commit_products(Location where);
void wait_for_products(int pending, Location where);
uint64_t describe_matrix(const void* data, int leading, int stride, int swizzle, Location where);
uint64_t moved(uint64_t matrix, int bytes, Location where);

}  // namespace diffit::emulation

namespace diffit::cuda {

inline void wgmma_fence(emulation::Location where = emulation::Location::current()) {
  emulation::fence_products(where);
}

inline void wgmma_commit(emulation::Location where = emulation::Location::current()) {
  emulation::commit_products(where);
}

template <int kPending>
void wgmma_wait(emulation::Location where = emulation::Location::current()) {
  emulation::wait_for_products(kPending, where);
}

// A matter between the source and the compiler.
template <int N>
void hold(float (&)[N]) {}
template <int N, int M>
void hold(uint32_t (&)[N][M]) {}

enum class Swizzle : int { kNone = 0, k128 = 1, k64 = 2 };

inline uint64_t matrix(const void* data, int leading, int stride, Swizzle swizzle,
                       emulation::Location where = emulation::Location::current()) {
  return emulation::describe_matrix(data, leading, stride, int(swizzle), where);
}

inline uint64_t moved(uint64_t matrix, int bytes,
                      emulation::Location where = emulation::Location::current()) {
  return emulation::moved(matrix, bytes, where);
}

template <class E, int N, int kMajorB = 0>
struct Wgmma {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256 && (kMajorB == 0 || kMajorB == 1));
  static void run(float (&d)[N / 2], uint64_t a, uint64_t b, bool add,
                  emulation::Location where = emulation::Location::current()) {
    emulation::multiply({emulation::number_table<E>(), N, kMajorB == 1, add, a, b, d, nullptr},
                        where);
  }
  static void run(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add,
                  emulation::Location where = emulation::Location::current()) {
    emulation::multiply({emulation::number_table<E>(), N, kMajorB == 1, add, 0, b, d, a}, where);
  }
};

}  // namespace diffit::cuda
