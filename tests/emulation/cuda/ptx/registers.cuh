// Twin of csrc/cuda/ptx/registers.cuh.
#pragma once

#include <cstdint>

namespace diffit::cuda {

inline void forget(uint32_t&) {}
inline void forget(int64_t&) {}

}  // namespace diffit::cuda
