// A row of adaln's forward, as a team of threads holds it: each has K times V neighbouring columns,
// S V apart. S threads read what lies on end, and the addresses are one and constants.
#pragma once

#include <cstdint>

#include "cuda/ptx/registers.cuh"
#include "cuda/team.cuh"
#include "cuda/vector.cuh"

namespace diffit::cuda {

// With K = 0 as many steps as it takes, and the thread's part of the row in shared memory, where
// its parts are a block's threads apart: for rows that cannot be read in vectors.
template <class X, int V>
struct SharedRow {
  Vector<X, V>* part;
  __device__ __forceinline__ Vector<X, V>& operator[](int k) const { return part[k * blockDim.x]; }
};

template <class X, int V, int K>
struct RowOf {
  using Type = Vector<X, V>[K];
};
template <class X, int V>
struct RowOf<X, V, 0> {
  using Type = SharedRow<X, V>;
};

// So that a row stays as it lies in memory, and not, twice as large, as floats.
template <class X, int V, int K>
__device__ __forceinline__ void stay_packed(Vector<X, V> (&x)[K]) {
  if constexpr (sizeof(X) < 4) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (uint32_t& word : x[k].words) forget(word);
    }
  }
}
template <class X, int V>
__device__ __forceinline__ void stay_packed(SharedRow<X, V>&) {}

// Where a thread's numbers of a row are. Rows have at least kLeast channels.
template <int V, int K, int S, int kLeast>
struct Columns {
  static constexpr int kStep = S * V;
  int steps, first, count;

  // `any_steps` if K is 0.
  __device__ __forceinline__ Columns(const Team& team, int channels, int any_steps)
      : steps(K > 0 ? K : any_steps),
        first((team.rank / S * (S * steps) + team.rank % S) * V),
        count(channels - first) {}
  __device__ __forceinline__ bool has(int k) const {
    return (k + 1) * kStep <= kLeast || k * kStep < count;
  }
};

}  // namespace diffit::cuda
