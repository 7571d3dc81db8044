// Descriptions of a (B, H, W, C) tensor and of the boxes that are copied from it, for ptx/tma.cuh.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/ptx/tma.cuh"
#include "number.h"

namespace diffit::cuda {

// `swizzle` is 0, 64 or 128 (bytes). The box has `box_channels` x `box_width` x `box_height`
// numbers of one sample, its channels innermost: as many as the swizzle has bytes, if there is one.
// 2-byte numbers; `data` is aligned to 16 bytes, and so are its rows.
inline TensorMap tensor_map(const void* data, Number number, int channels, int width, int height,
                            int batch, int box_channels, int box_width, int box_height,
                            int swizzle) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                           cudaEnableDefault, &found),
          "cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<Encode>(function);
  }();
  const cuuint64_t row = uint64_t{2} * channels;
  const cuuint64_t sizes[] = {cuuint64_t(channels), cuuint64_t(width), cuuint64_t(height),
                              cuuint64_t(batch)};
  const cuuint64_t strides[] = {row, row * width, row * width * height};
  const cuuint32_t box[] = {cuuint32_t(box_channels), cuuint32_t(box_width), cuuint32_t(box_height),
                            1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  TensorMap map;
  const CUresult result =
      encode(&map,
             number == Number::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                         : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             4, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
             : swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                             : CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(
        "cuTensorMapEncodeTiled refused (" + std::to_string(batch) + ", " + std::to_string(height) +
        ", " + std::to_string(width) + ", " + std::to_string(channels) + "), box of " +
        std::to_string(box_channels) + " channels: error " + std::to_string(int(result)));
  }
  return map;
}

}  // namespace diffit::cuda
