// Working memory of a kernel: one allocation, handed out in pieces that start on a cache line.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace diffit {

class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    base_ = static_cast<float*>(std::aligned_alloc(kLine, round(floats) * sizeof(float)));
    if (!base_) throw std::bad_alloc();
    next_ = base_;
  }
  ~Scratch() { std::free(base_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // As many floats as `take` hands out for `floats` of them.
  static constexpr int64_t round(int64_t floats) { return (floats + 15) / 16 * 16; }

  float* take(int64_t floats) {
    float* piece = next_;
    next_ += round(floats);
    return piece;
  }

 private:
  static constexpr std::size_t kLine = 64;
  float* base_;
  float* next_;
};

}  // namespace diffit
