// Twin of csrc/cuda/ptx/address.cuh.
#pragma once

#include <cstdint>

#include "emulation.h"

namespace diffit::cuda {

inline uint32_t shared_address(const void* pointer,
                               emulation::Location where = emulation::Location::current()) {
  return emulation::shared_address(pointer, where);
}

}  // namespace diffit::cuda
