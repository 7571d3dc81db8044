// What kernels and their launchers ask of the CUDA runtime.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace diffit::cuda {

// A block's shared memory, as much as its launch asked for; aligned to 1024 bytes.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return memory;
}

// `what`, which becomes a std::string only if there is an error, says what was tried.
template <class What>
void check(cudaError_t error, const What& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that it is not found again by who comes next
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// A property of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// 90 for compute capability 9.0.
inline int compute_capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
         device_attribute(cudaDevAttrComputeCapabilityMinor);
}

// Bytes of shared memory that a block may ask for.
inline int shared_memory_limit() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

// Lets a kernel have so much shared memory. Once a kernel and device would do; it takes well under
// a microsecond.
template <class Arguments, class What>
void allow_shared(void (*kernel)(Arguments), int shared_bytes, const What& what) {
  if (shared_bytes <= 48 * 1024) return;
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        what);
}

// Blocks of a kernel that the device runs at a time.
template <class Arguments, class What>
int resident_blocks(void (*kernel)(Arguments), int threads, int shared_bytes, const What& what) {
  allow_shared(kernel, shared_bytes, what);
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes),
        what);
  return blocks * multiprocessors();
}

// Starts `kernel` with one argument, a struct, on the current device. Safe in CUDA graph capture.
// `what` names the kernel and its shapes in the error of a launch that is refused.
template <class Arguments, class What>
void launch(void (*kernel)(Arguments), const Arguments& arguments, dim3 grid, int threads,
            int shared_bytes, void* stream, const What& what) {
  allow_shared(kernel, shared_bytes, what);
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments);
  check(cudaGetLastError(), what);
}

}  // namespace diffit::cuda
