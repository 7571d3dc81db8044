// What adaln's forward multiplies rows by, and adds to them.
#pragma once

#include <cstdint>

#include "cuda/kernels.h"
#include "cuda/vector.cuh"

namespace diffit::cuda {

// Where the modulation of a token begins.
__device__ __forceinline__ int64_t row_of(const Modulation& modulation, int sample, int token) {
  return sample * modulation.sample_stride + token * modulation.token_stride;
}

// What x̂ and the branch meet: the factor weight (1 + scale), what is added, bias (1 + scale) +
// shift, and the gate.
enum Parameter { kFactor, kOffset, kGate };

template <int V>
__device__ __forceinline__ void read_affine(float (&factor)[V], float (&offset)[V], const AdaLN& a,
                                            int sample, int token, int c) {
  float by[V];
#pragma unroll
  for (int i = 0; i < V; ++i) factor[i] = 1, offset[i] = 0;
  if (a.weight.data) read(factor, a.weight.data, a.weight.number, c);
  if (a.bias.data) read(offset, a.bias.data, a.bias.number, c);
  if (a.scale.data) {
    read(by, a.scale.data, a.scale.number, row_of(a.scale, sample, token) + c);
#pragma unroll
    for (int i = 0; i < V; ++i) factor[i] *= 1 + by[i], offset[i] *= 1 + by[i];
  }
  if (a.shift.data) {
    read(by, a.shift.data, a.shift.number, row_of(a.shift, sample, token) + c);
#pragma unroll
    for (int i = 0; i < V; ++i) offset[i] += by[i];
  }
}

// They are read for each row; or once by a block for all of its rows, which are of one sample, and
// kept as floats in shared memory. There the two halves of 8 neighbours lie apart, so that a warp
// reads 16 bytes a thread, on end.
template <bool kShared, int V>
class Parameters {
 public:
  __device__ __forceinline__ Parameters(const AdaLN& a, float* room, int sample)
      : a_(a), room_(room), sample_(sample) {}

  // All threads of the block; they can be read after a barrier.
  __device__ __forceinline__ void share() const {
    static_assert(kShared && V == 8);
#pragma unroll 1
    for (int c = threadIdx.x * V; c < a_.channels; c += blockDim.x * V) {
      float factor[V], offset[V];
      read_affine(factor, offset, a_, sample_, 0, c);
      put(kFactor, c, factor), put(kOffset, c, offset);
      if (!a_.gate.data) continue;
      read(factor, a_.gate.data, a_.gate.number, row_of(a_.gate, sample_, 0) + c);
      put(kGate, c, factor);
    }
  }

  __device__ __forceinline__ void affine(float (&factor)[V], float (&offset)[V], int token,
                                         int c) const {
    if constexpr (kShared) {
      get(factor, kFactor, c), get(offset, kOffset, c);
    } else {
      read_affine(factor, offset, a_, sample_, token, c);
    }
  }

  __device__ __forceinline__ void gate(float (&gate)[V], int token, int c) const {
    if constexpr (kShared) {
      get(gate, kGate, c);
    } else {
      read(gate, a_.gate.data, a_.gate.number, row_of(a_.gate, sample_, token) + c);
    }
  }

 private:
  __device__ __forceinline__ float4* place(Parameter which, int c) const {
    return reinterpret_cast<float4*>(room_ + which * a_.channels + c / 2);
  }
  __device__ __forceinline__ void put(Parameter which, int c, const float (&from)[V]) const {
    place(which, c)[0] = {from[0], from[1], from[2], from[3]};
    place(which, c)[a_.channels / 8] = {from[4], from[5], from[6], from[7]};
  }
  __device__ __forceinline__ void get(float (&to)[V], Parameter which, int c) const {
    const float4 low = place(which, c)[0], high = place(which, c)[a_.channels / 8];
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
  }

  const AdaLN& a_;
  float* room_;
  int sample_;
};

}  // namespace diffit::cuda
