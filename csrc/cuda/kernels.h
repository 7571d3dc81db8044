// What the CUDA kernels compute, as plain pointers, sizes and a stream; the functions that launch
// them on the current device. They return at once, and throw std::runtime_error if a launch is
// refused. Every result is the same, to the bit, whenever the same call is made on a device.
#pragma once

#include <cstdint>

#include "number.h"

namespace diffit::cuda {

// A tensor that may be left out, and may be of another number than the activations.
struct Input {
  const void* data;
  Number number;
};

// See cuda/window_attention.cuh.
struct WindowAttention {
  Number number;  // of qkv, out, grad_out, dqkv: bfloat16 or float16
  int batch, height, width, heads, head_dim, window_height, window_width;
  float scale;
  const void* qkv;       // (B, H, W, 3C)
  Input temb;            // (B, 2C): the time token's q part, then its v part; or none
  Input table;           // ((2h-1)(2w-1), nH); or none
  void* out;             // (B, H, W, C)
  float* lse;            // (windows, nH, L): log2 of the sum of 2^(score log2 e) over the keys
  const void* grad_out;  // (B, H, W, C)
  void* dqkv;            // (B, H, W, 3C)
  float* scratch;        // backward_scratch() floats, for the backward
  void* dtemb;           // (B, 2C), of temb's number; or null
  void* dtable;          // ((2h-1)(2w-1), nH), of table's number; or null

  constexpr int channels() const { return heads * head_dim; }
  constexpr int tokens() const { return window_height * window_width; }
  constexpr int windows_of_sample() const {
    return height / window_height * (width / window_width);
  }
  constexpr int windows() const { return batch * windows_of_sample(); }
  constexpr int table_size() const { return (2 * window_height - 1) * (2 * window_width - 1); }
};

enum class Family { kTensorCores, kHopper };  // mma.sync, from sm_80 on; wgmma and TMA, sm_90a

// Floats of scratch memory that the backward needs: by sizes alone.
int64_t backward_scratch(const WindowAttention&, Family);

void window_attention_forward(const WindowAttention&, Family, void* stream);
void window_attention_backward(const WindowAttention&, Family, void* stream);

// Whether the Hopper family has kernels for the shape; the other one has them for all that
// diffit_kernels/ops/window_attention/native_cuda.py lets through.
bool hopper_serves(const WindowAttention&);

// The Hopper family's part of the three functions above.
void window_attention_forward_hopper(const WindowAttention&, void* stream);
int64_t hopper_backward_scratch(const WindowAttention&);
void window_attention_backward_hopper(const WindowAttention&, void* stream);

// A row per sample (token_stride 0) or per token, and its gradient: contiguous, of its number.
struct Modulation {
  const void* data;  // null where there is none
  Number number;
  int64_t sample_stride, token_stride;
  void* grad;  // null where it is not wanted
};

// See cuda/adaln.cuh and cuda/adaln_backward.cuh.
struct AdaLN {
  Number number;  // of x, residual, out, grad_out, grad_residual, dx
  int samples, tokens, channels;
  float eps;
  const void* x;  // (B, N, C); in the backward the new one
  Input y;        // (B, N, C)
  Modulation gate, shift, scale;
  Input weight, bias;         // (C,)
  void* out;                  // (B, N, C)
  void* residual;             // (B, N, C): the new x; or null without y
  float *mean, *rstd;         // (B, N)
  const void* grad_out;       // (B, N, C)
  const void* grad_residual;  // (B, N, C); or null
  void* dx;                   // (B, N, C)
  void* dy;                   // (B, N, C), of y's number; or null
  void *dweight, *dbias;      // (C,), of weight's and bias's numbers; or null
  float* scratch;             // backward_scratch() floats, for the backward
};

constexpr int kAdaLNChannels = 16384;  // of a row, at most

int64_t backward_scratch(const AdaLN&);

void adaln_forward(const AdaLN&, void* stream);
void adaln_backward(const AdaLN&, void* stream);

}  // namespace diffit::cuda
