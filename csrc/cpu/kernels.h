// What the CPU kernels compute, as plain pointers and sizes, and the table in which each
// instruction set offers its build of them. A kernel does tasks begin to end; tasks are
// independent, and what a task computes does not depend on who runs it, so results are the same for
// any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "number.h"

namespace diffit {

// See cpu/window_attention.h.
struct WindowAttention {
  Number number;  // of qkv, out, grad_out, dqkv
  int64_t batch, height, width, heads, head_dim, window_height, window_width;
  float scale;
  const void* qkv;       // (B, H, W, 3C)
  const float* temb;     // (B, 2C): the time token's q part, then its v part; or null
  const float* table;    // (nH, (2h-1)(2w-1)); or null
  void* out;             // (B, H, W, C)
  const void* grad_out;  // (B, H, W, C)
  void* dqkv;            // (B, H, W, 3C)
  float* dtemb;          // (B, windows, 2C): each window's part of the gradient; or null
  float* dtable;         // (groups, nH, (2h-1)(2w-1)): each group's part; or null
  int64_t groups;        // into which the backward cuts the windows of the batch

  int64_t tokens() const { return window_height * window_width; }
  int64_t windows() const { return batch * height * width / tokens(); }
  int64_t table_size() const { return (2 * window_height - 1) * (2 * window_width - 1); }
  // Numbers of a head's bias, expanded for all pairs of tokens and padded.
  int64_t bias_size() const { return tokens() * ((tokens() + 15) / 16 * 16); }
  // Whether the bias of all heads is kept: then a task goes through windows, and all heads in each,
  // so that memory is read along its rows. Else it goes through windows for one head.
  bool by_window() const { return heads * bias_size() <= kKeptBias; }

  static constexpr int64_t kKeptBias = 64 * 1024;
};

// One large window keeps many threads busy: a forward task takes at most so many of its queries.
constexpr int64_t kTaskQueries = 256;

inline int64_t forward_tasks(const WindowAttention& a) {
  return a.windows() * a.heads * ((a.tokens() + kTaskQueries - 1) / kTaskQueries);
}

// Groups for enough backward tasks, however many threads there are; of several small windows each,
// as what a task does once costs as much as a few of those.
inline int64_t backward_groups(const WindowAttention& a) {
  const int64_t windows = a.windows();
  if (a.by_window()) return std::clamp<int64_t>(windows / 8, 1, 256);
  return std::min(windows, (256 + a.heads - 1) / a.heads);
}

inline int64_t backward_tasks(const WindowAttention& a) {
  return a.by_window() ? a.groups : a.groups * a.heads;
}

// A tensor of a storage type of its own; data is null where it is not given.
struct Input {
  const void* data;
  Number number;
};

// One row per sample (token_stride 0) or per token, and its gradient, contiguous and of its type.
struct Modulation {
  const void* data;  // null where there is none
  Number number;
  int64_t sample_stride, token_stride;
  void* grad;  // null where it is not wanted
};

// See cpu/adaln.h and cpu/adaln_backward.h.
struct AdaLN {
  Number number;  // of x, residual, out, grad_out, grad_residual, dx
  int64_t samples, tokens, channels;
  float eps;
  const void* x;  // (B, N, C); in the backward the new one
  Input y;        // (B, N, C)
  Modulation gate, shift, scale;
  Input weight, bias;    // (C,)
  void* out;             // (B, N, C)
  void* residual;        // (B, N, C): the new x; or null without y
  float *mean, *rstd;    // (B, N)
  const void* grad_out;  // (B, N, C)
  const void* grad_residual;
  void* dx;
  void* dy;        // of y's number
  int64_t chunks;  // into which the backward cuts each sample's tokens
  // Sums over each chunk's tokens, (B, chunks, C), or null where nothing follows from them: of h,
  // of h x̂, of y dx, of grad_out.
  float *sum, *sum_normed, *sum_branch, *sum_dout;
  void *dweight, *dbias;  // (C,), of weight's and bias's numbers, or null
};

constexpr int64_t kAdaLNRows = 8;    // tokens of a forward task
constexpr int64_t kSumColumns = 64;  // of a task that adds up rows of sums

// See cpu/linear.h.
struct Linear {
  int64_t rows, columns, terms;  // of out: M and N; of a sum: K
  const float* left;             // (M, K)
  const float* right;            // (K, N), or (N, K) if transposed
  bool transposed;
  const float* bias;  // (N,), or null
  float* out;         // (M, N)
  int64_t blocks;     // into which rows are cut
};

constexpr int64_t kLinearRows = 64;  // of a task at least

// See cpu/mlp.h.
struct Gelu {
  Number number;
  bool exact;             // or the tanh form
  int64_t rows, columns;  // of hidden, activation, grad
  const void* hidden;
  void* activation;  // may be hidden
  void* grad;        // in the backward: of the activation, then of hidden
  int64_t chunks;    // of rows
  float* sum;        // (chunks, columns): each chunk's sum of grad's rows; or null
};

constexpr int64_t kGeluBlock = 8192;  // numbers of a forward task

struct SumRows {
  const float* rows;  // (count, columns)
  int64_t count, columns;
  void* out;  // (columns,)
  Number number;
};

// See cpu/group_norm.h and cpu/group_norm_backward.h.
struct GroupNorm {
  Number number;  // of x, out, grad_out, dx
  int64_t samples, pixels, channels, groups;
  float eps;
  const void* x;       // (B, pixels, C)
  Input weight, bias;  // (C,)
  void* out;           // (B, pixels, C)
  float *mean, *rstd;  // (B, groups)
  int64_t chunks;      // of a sample's pixels
  float* parts;        // (B, chunks, 2, C): each chunk's mean, and sum of squares about it
  const void* grad_out;
  void* dx;
  float *sum, *sum_normed;  // (B, chunks, C): each chunk's sums of dz and of dz x̂
};

struct Kernels {
  const char* name;
  using WindowAttentionKernel = void (*)(const WindowAttention&, int64_t begin, int64_t end);
  WindowAttentionKernel window_attention_forward;
  WindowAttentionKernel window_attention_backward;
  using AdaLNKernel = void (*)(const AdaLN&, int64_t begin, int64_t end);
  AdaLNKernel adaln_forward, adaln_backward, adaln_sums;
  void (*linear)(const Linear&, int64_t begin, int64_t end);
  int64_t linear_columns;  // of a task
  using GeluKernel = void (*)(const Gelu&, int64_t begin, int64_t end);
  GeluKernel gelu_forward, gelu_backward;
  void (*sum_rows)(const SumRows&, int64_t begin, int64_t end);
  using GroupNormKernel = void (*)(const GroupNorm&, int64_t begin, int64_t end);
  GroupNormKernel group_norm_statistics, group_norm_merge, group_norm_normalise;
  GroupNormKernel group_norm_sums, group_norm_input;
};

// One per instruction set that this library was compiled for; see isa_*.cpp.
extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;
#endif

// The best of this processor's, or the one named (with those below it, if the processor lacks it).
const Kernels& kernels();

}  // namespace diffit
