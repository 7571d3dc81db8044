// The rows that adaln's backward reads, on their way before they are needed.
#pragma once

#include <cstdint>

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/team.cuh"
#include "cuda/vector.cuh"

namespace diffit::cuda {

struct AdaLNBackward : AdaLN {
  TeamSize team;     // for a row
  int chunks;        // of a sample's tokens
  int stages;        // rows of a team that are on their way, or here, at a time: 1 to 4
  int ahead_offset;  // where those are in shared memory
  // (B, chunks, C), or null where nothing follows from them: sums of h, h x̂, y dx, grad_out.
  float *sum, *sum_normed, *sum_branch, *sum_dout;
  // (B, N, 2): mean(du) and mean(du x̂), if rows are wider than a team; or null.
  float* row_means;
};

// A thread's own numbers of each tensor's next rows, K times V of them, kStep apart. Copies arrive
// in a part of shared memory that no other thread looks at, so they take neither registers nor
// barriers. Where V numbers are not the 16 bytes of a copy, they are read when they are needed.
template <class X, int V, int K, int kStep>
class Ahead {
 public:
  static constexpr bool kCopies = V * sizeof(X) == 16;

  static constexpr __host__ __device__ bool y_comes_ahead(const AdaLNBackward& a) {
    return a.gate.data && a.y.number == a.number;
  }
  // Bytes of a stage that a thread has.
  static constexpr int stage_bytes(const AdaLNBackward& a) {
    return kCopies ? (2 + (a.grad_residual != nullptr) + y_comes_ahead(a)) * K * 16 : 0;
  }

  // Rows are found by their offset from number `block_at` of each tensor. The thread has those of
  // the K whose first column, k * kStep, is less than `columns`.
  __device__ __forceinline__ Ahead(const AdaLNBackward& a, int64_t block_at, int columns)
      : a_(a),
        x_(static_cast<const X*>(a.x) + block_at),
        grad_out_(static_cast<const X*>(a.grad_out) + block_at),
        grad_residual_(static_cast<const X*>(a.grad_residual) + block_at),
        y_(static_cast<const X*>(a.y.data) + block_at),
        columns_(columns),
        tensor_(16 * K * blockDim.x),
        y_place_(a.grad_residual ? 3 * tensor_ : 2 * tensor_),
        stage_(y_comes_ahead(a) ? y_place_ + tensor_ : y_place_),
        here_(a.ahead_offset + 16 * threadIdx.x),
        free_(here_),
        end_(here_ + a.stages * stage_) {}

  // Starts copying the first a.stages - 1 rows, `stride` apart, of which `count` exist.
  __device__ __forceinline__ void start_first(int offset, int stride, int count) {
    for (int i = 0; i < a_.stages - 1; ++i, free_ += stage_) start(offset + i * stride, i < count);
  }

  // Starts copying the next row after those; zeros if not `valid`.
  __device__ __forceinline__ void start(int offset, bool valid) {
    if constexpr (kCopies) {
      copy(free_, x_ + offset, valid);
      copy(free_ + tensor_, grad_out_ + offset, valid);
      if (a_.grad_residual) copy(free_ + 2 * tensor_, grad_residual_ + offset, valid);
      if (y_comes_ahead(a_)) copy(free_ + y_place_, y_ + offset, valid);
      commit_copies();
    }
  }

  // Waits for the oldest of a.stages rows that were started: the one that is read below.
  __device__ __forceinline__ void wait() const {
    if constexpr (kCopies) {
      if (a_.stages == 4) {
        wait_copies<3>();
      } else if (a_.stages == 3) {
        wait_copies<2>();
      } else if (a_.stages == 2) {
        wait_copies<1>();
      } else {
        wait_copies<0>();
      }
    }
  }

  // Waits for what was started beyond the last row: zeros, written where something else may be
  // next.
  __device__ __forceinline__ void wait_all() const {
    if constexpr (kCopies) wait_copies<0>();
  }

  // Goes on to the row after it, and gives up its place.
  __device__ __forceinline__ void advance() {
    free_ = here_;
    here_ += stage_;
    if (here_ == end_) here_ = a_.ahead_offset + 16 * threadIdx.x;
  }

  __device__ __forceinline__ void x(float (&to)[V], int k, int offset, bool valid) const {
    get(to, here_, x_ + offset, k, valid);
  }
  __device__ __forceinline__ void grad_out(float (&to)[V], int k, int offset, bool valid) const {
    get(to, here_ + tensor_, grad_out_ + offset, k, valid);
  }
  __device__ __forceinline__ void grad_residual(float (&to)[V], int k, int offset) const {
    get(to, here_ + 2 * tensor_, grad_residual_ + offset, k, true);
  }
  __device__ __forceinline__ void y(float (&to)[V], int k, int offset, int64_t at) const {
    if (y_comes_ahead(a_)) {
      get(to, here_ + y_place_, y_ + offset, k, true);
    } else {
      read(to, a_.y.data, a_.y.number, at);
    }
  }

 private:
  __device__ __forceinline__ unsigned char* place(int offset, int k) const {
    return shared_memory() + offset + k * (16 * blockDim.x);
  }

  __device__ __forceinline__ void copy(int to, const X* from, bool valid) const {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      copy_async(place(to, k), from + k * kStep, valid && k * kStep < columns_);
    }
  }

  __device__ __forceinline__ void get(float (&to)[V], int offset, const X* from, int k,
                                      bool valid) const {
    Vector<X, V> numbers{};
    if constexpr (kCopies) {
      const auto got = *reinterpret_cast<const uint4*>(place(offset, k));
      numbers = {{got.x, got.y, got.z, got.w}};
    } else if (valid && k * kStep < columns_) {
      numbers = load<X, V>(from + k * kStep);
    }
    to_floats<X>(to, numbers);
  }

  const AdaLNBackward& a_;
  const X *x_, *grad_out_, *grad_residual_, *y_;
  int columns_;
  int tensor_, y_place_, stage_;  // bytes of shared memory
  int here_, free_, end_;         // offsets in it
};

}  // namespace diffit::cuda
