// Twin of csrc/cuda/tensor_map.cuh, with the conditions of cuTensorMapEncodeTiled.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/launch.cuh"
#include "cuda/ptx/tma.cuh"
#include "number.h"

namespace diffit::cuda {

inline TensorMap tensor_map(const void* data, Number number, int channels, int width, int height,
                            int batch, int box_channels, int box_width, int box_height,
                            int swizzle) {
  const auto demand = [](bool truth, const std::string& rule) {
    if (!truth) throw std::runtime_error("tensor_map: " + rule);
  };
  const int64_t row = int64_t{2} * channels;
  TensorMap map{static_cast<unsigned char*>(const_cast<void*>(data)),
                {channels, width, height, batch},
                {2, row, row * width, row * width * height},
                {box_channels, box_width, box_height, 1},
                swizzle,
                emulation::kTensorMapMark};
  demand(number == Number::kBFloat16 || number == Number::kFloat16, "numbers of 2 bytes");
  demand(reinterpret_cast<uintptr_t>(data) % 16 == 0, "data must be aligned to 16 bytes");
  for (int i = 0; i < 4; ++i) {
    const std::string of = " of dimension " + std::to_string(i) + ", got ";
    demand(map.sizes[i] >= 1, "a positive size" + of + std::to_string(map.sizes[i]));
    demand(map.box[i] >= 1 && map.box[i] <= 256,
           "a box of 1 to 256 numbers" + of + std::to_string(map.box[i]));
    demand(i == 0 || (map.strides[i] % 16 == 0 && map.strides[i] < int64_t{1} << 40),
           "a stride of a multiple of 16 bytes below 2^40" + of + std::to_string(map.strides[i]));
  }
  demand(box_channels * 2 % 16 == 0,
         "rows of a box are multiples of 16 bytes, got " + std::to_string(box_channels * 2));
  demand(swizzle == 0 || swizzle == 32 || swizzle == 64 || swizzle == 128,
         "a swizzle of 0, 32, 64 or 128 bytes, got " + std::to_string(swizzle));
  // The driver allows narrower rows, which the engine pads.
  demand(swizzle == 0 || box_channels * 2 == swizzle, "rows as wide as the swizzle, got " +
                                                          std::to_string(box_channels * 2) +
                                                          " for " + std::to_string(swizzle));
  return map;
}

}  // namespace diffit::cuda
