// Every op of the CPU library, and its one file that includes torch. The ops take contiguous
// tensors of the shapes that the native backend in diffit_kernels/ops/<stage>/ makes, and write
// into those it allocated.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "cpu/kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

using at::Tensor;
using diffit::kernels;

std::string cpu_capability() { return kernels().name; }

diffit::Number number_of(const Tensor& tensor) {
  TORCH_CHECK(tensor.is_cpu(), "CPU kernels take tensors on the CPU, got ", tensor.device());
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return diffit::Number::kFloat32;
    case at::kBFloat16:
      return diffit::Number::kBFloat16;
    case at::kHalf:
      return diffit::Number::kFloat16;
    default:
      TORCH_CHECK(false, "CPU kernels take float32, bfloat16 and float16, got ",
                  tensor.scalar_type());
  }
}

const void* pointer(const Tensor& tensor) { return tensor.const_data_ptr(); }

const float* floats(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<float>() : nullptr;
}

// Where a result is written: nowhere if it is left out, which a tensor without elements says. The
// allocator gives large tensors fresh memory, whose first touch costs more than the kernels' work
// page by page: large pages are asked for where they are to be had on request.
void* result(const Tensor& tensor) {
  if (!tensor.numel()) return nullptr;
  void* data = tensor.mutable_data_ptr();
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + tensor.nbytes()) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return data;
}

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

// How many of `tasks`, which go over so many numbers in all, are worth waking a thread for.
int64_t grain(int64_t tasks, int64_t numbers) {
  constexpr int64_t kWorthAThread = 32768;  // numbers: about 10 µs
  return std::max<int64_t>(1, blocks(tasks * kWorthAThread, std::max<int64_t>(1, numbers)));
}

// Tasks 0 to `tasks` of a kernel, over PyTorch's threads.
template <class Arguments>
void run(void (*kernel)(const Arguments&, int64_t, int64_t), const Arguments& arguments,
         int64_t tasks, int64_t grain = 1) {
  at::parallel_for(0, tasks, grain,
                   [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

// Into how many chunks each sample's rows are cut where a task leaves sums over its rows: enough
// for many threads, of at least 16 rows, so that the sums are little beside them, and of at most
// 64, so that no sum is over many terms. Threads do not count: results are the same for any number.
int64_t chunks(int64_t samples, int64_t rows) {
  const int64_t for_threads = std::min<int64_t>(rows / 16, 128 / std::max<int64_t>(1, samples));
  return std::max<int64_t>({1, for_threads, blocks(rows, 64)});
}

Tensor room(at::IntArrayRef sizes) { return at::empty(sizes, at::kFloat); }

void sum_rows(const float* rows, int64_t count, const Tensor& out) {
  const diffit::SumRows a{rows, count, out.numel(), out.mutable_data_ptr(), number_of(out)};
  const int64_t tasks = blocks(a.columns, diffit::kSumColumns);
  run(kernels().sum_rows, a, tasks, grain(tasks, count * a.columns));
}

// ---- window_attention --------------------------------------------------------------------------

diffit::WindowAttention window_attention(const Tensor& qkv, const std::optional<Tensor>& temb,
                                         const std::optional<Tensor>& table, int64_t num_heads,
                                         at::IntArrayRef window, double scale) {
  diffit::WindowAttention a{};
  a.number = number_of(qkv);
  a.batch = qkv.size(0), a.height = qkv.size(1), a.width = qkv.size(2);
  a.heads = num_heads, a.head_dim = qkv.size(3) / 3 / num_heads;
  a.window_height = window[0], a.window_width = window[1];
  a.scale = static_cast<float>(scale);
  a.qkv = pointer(qkv), a.temb = floats(temb), a.table = floats(table);
  return a;
}

void window_attention_forward(const Tensor& qkv, const std::optional<Tensor>& temb,
                              const std::optional<Tensor>& table, int64_t num_heads,
                              at::IntArrayRef window, double scale, const Tensor& out) {
  auto a = window_attention(qkv, temb, table, num_heads, window, scale);
  a.out = result(out);
  run(kernels().window_attention_forward, a, diffit::forward_tasks(a));
}

void window_attention_backward(const Tensor& grad_out, const Tensor& qkv,
                               const std::optional<Tensor>& temb,
                               const std::optional<Tensor>& table, int64_t num_heads,
                               at::IntArrayRef window, double scale, const Tensor& dqkv,
                               const Tensor& dtemb, const Tensor& dtable) {
  auto a = window_attention(qkv, temb, table, num_heads, window, scale);
  a.grad_out = pointer(grad_out), a.dqkv = result(dqkv);
  a.dtemb = static_cast<float*>(result(dtemb));
  a.groups = diffit::backward_groups(a);
  const Tensor parts = room({table.has_value() ? a.groups : 0, dtable.numel()});
  a.dtable = static_cast<float*>(result(parts));
  run(kernels().window_attention_backward, a, diffit::backward_tasks(a));
  if (a.dtable) sum_rows(a.dtable, a.groups, dtable);
}

// ---- adaln -------------------------------------------------------------------------------------

diffit::Input input(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return {};
  return {pointer(*tensor), number_of(*tensor)};
}

diffit::Modulation modulation(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return {};
  const int64_t token_stride = tensor->size(1) == 1 ? 0 : tensor->stride(1);
  return {pointer(*tensor), number_of(*tensor), tensor->stride(0), token_stride, nullptr};
}

bool per_sample(const diffit::Modulation& m) { return m.data && !m.token_stride; }

diffit::AdaLN adaln(const Tensor& x, const std::optional<Tensor>& y,
                    const std::optional<Tensor>& gate, const std::optional<Tensor>& shift,
                    const std::optional<Tensor>& scale, const std::optional<Tensor>& weight,
                    const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& rstd) {
  diffit::AdaLN a{};
  a.number = number_of(x);
  a.samples = x.size(0), a.tokens = x.size(1), a.channels = x.size(2);
  a.x = pointer(x), a.y = input(y);
  a.gate = modulation(gate), a.shift = modulation(shift), a.scale = modulation(scale);
  a.weight = input(weight), a.bias = input(bias);
  a.mean = mean.mutable_data_ptr<float>(), a.rstd = rstd.mutable_data_ptr<float>();
  if (!per_sample(a.gate) && !per_sample(a.shift) && !per_sample(a.scale)) {
    a.tokens *= a.samples;  // no sample has anything of its own: they are as one
    a.samples = 1;
  }
  return a;
}

void adaln_forward(const Tensor& x, const std::optional<Tensor>& y,
                   const std::optional<Tensor>& gate, const std::optional<Tensor>& shift,
                   const std::optional<Tensor>& scale, const std::optional<Tensor>& weight,
                   const std::optional<Tensor>& bias, double eps, const Tensor& out,
                   const Tensor& residual, const Tensor& mean, const Tensor& rstd) {
  auto a = adaln(x, y, gate, shift, scale, weight, bias, mean, rstd);
  a.eps = static_cast<float>(eps);
  a.out = result(out), a.residual = result(residual);
  const int64_t tasks = blocks(a.samples * a.tokens, diffit::kAdaLNRows);
  run(kernels().adaln_forward, a, tasks, grain(tasks, x.numel()));
}

void adaln_backward(const Tensor& grad_out, const std::optional<Tensor>& grad_residual,
                    const Tensor& residual, const std::optional<Tensor>& y,
                    const std::optional<Tensor>& gate, const std::optional<Tensor>& shift,
                    const std::optional<Tensor>& scale, const std::optional<Tensor>& weight,
                    const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& rstd,
                    const Tensor& dx, const Tensor& dy, const Tensor& dgate, const Tensor& dshift,
                    const Tensor& dscale, const Tensor& dweight, const Tensor& dbias) {
  auto a = adaln(residual, y, gate, shift, scale, weight, bias, mean, rstd);
  a.grad_out = pointer(grad_out), a.grad_residual = input(grad_residual).data;
  a.dx = result(dx), a.dy = result(dy), a.dweight = result(dweight), a.dbias = result(dbias);
  a.gate.grad = result(dgate), a.shift.grad = result(dshift), a.scale.grad = result(dscale);
  a.shift.data = nullptr;  // which no gradient depends on
  a.chunks = chunks(a.samples, a.tokens);
  const bool shift_apart = dshift.numel() && !a.shift.token_stride && a.scale.token_stride;
  const bool common = per_sample(a.scale) || a.dweight || a.dbias ||
                      (dshift.numel() && !a.shift.token_stride && !shift_apart);
  const std::pair<float**, bool> wanted[] = {{&a.sum, common},
                                             {&a.sum_normed, common},
                                             {&a.sum_branch, per_sample(a.gate)},
                                             {&a.sum_dout, shift_apart}};
  int64_t kinds = 0;
  for (const auto& [pointer, is_wanted] : wanted) kinds += is_wanted;
  const Tensor sums = room({kinds, a.samples * a.chunks, a.channels});
  float* next = sums.mutable_data_ptr<float>();
  for (const auto& [pointer, is_wanted] : wanted) {
    if (!is_wanted) continue;
    *pointer = next;
    next += a.samples * a.chunks * a.channels;
  }
  const int64_t tasks = a.samples * a.chunks;
  run(kernels().adaln_backward, a, tasks, grain(tasks, residual.numel()));
  const int64_t sum_tasks = blocks(a.channels, diffit::kSumColumns);
  if (kinds) run(kernels().adaln_sums, a, sum_tasks, grain(sum_tasks, sums.numel()));
}

// ---- mlp ---------------------------------------------------------------------------------------

diffit::Gelu gelu(const Tensor& hidden, const Tensor& activation, bool exact) {
  diffit::Gelu a{};
  a.number = number_of(hidden);
  a.exact = exact;
  a.columns = hidden.size(-1), a.rows = a.columns ? hidden.numel() / a.columns : 0;
  a.hidden = pointer(hidden), a.activation = result(activation);
  return a;
}

void gelu_forward(const Tensor& hidden, const Tensor& activation, bool exact) {
  const auto a = gelu(hidden, activation, exact);
  const int64_t tasks = blocks(hidden.numel(), diffit::kGeluBlock);
  run(kernels().gelu_forward, a, tasks, grain(tasks, hidden.numel()));
}

void gelu_backward(const Tensor& hidden, const Tensor& activation, const Tensor& grad,
                   const Tensor& dbias, bool exact) {
  auto a = gelu(hidden, activation, exact);
  a.grad = grad.mutable_data_ptr();
  a.chunks = chunks(1, a.rows);
  const Tensor sums = room({dbias.numel() ? a.chunks : 0, a.columns});
  a.sum = dbias.numel() ? sums.mutable_data_ptr<float>() : nullptr;
  run(kernels().gelu_backward, a, a.chunks, grain(a.chunks, hidden.numel()));
  if (a.sum) sum_rows(a.sum, a.chunks, dbias);
}

// ---- linear ------------------------------------------------------------------------------------

void linear(const Tensor& left, const Tensor& right, bool transposed,
            const std::optional<Tensor>& bias, const Tensor& out) {
  diffit::Linear a{};
  a.rows = out.size(0), a.columns = out.size(1), a.terms = left.size(1);
  a.left = left.const_data_ptr<float>(), a.right = right.const_data_ptr<float>();
  a.transposed = transposed, a.bias = floats(bias), a.out = static_cast<float*>(result(out));
  // Blocks of rows where there are fewer panels than threads could share evenly; each of them packs
  // the panels again.
  const int64_t panels = blocks(a.columns, kernels().linear_columns);
  const int64_t wanted = blocks(4 * at::get_num_threads(), panels);
  a.blocks = std::clamp<int64_t>(a.rows / diffit::kLinearRows, 1, wanted);
  run(kernels().linear, a, panels * a.blocks);
}

// ---- group_norm --------------------------------------------------------------------------------

diffit::GroupNorm group_norm(const Tensor& x, const std::optional<Tensor>& weight,
                             const std::optional<Tensor>& bias, const Tensor& mean,
                             const Tensor& rstd) {
  diffit::GroupNorm a{};
  a.number = number_of(x);
  a.samples = x.size(0), a.pixels = x.size(1) * x.size(2), a.channels = x.size(3);
  a.groups = mean.size(1);
  a.x = pointer(x), a.weight = input(weight), a.bias = input(bias);
  a.mean = mean.mutable_data_ptr<float>(), a.rstd = rstd.mutable_data_ptr<float>();
  a.chunks = blocks(a.pixels, std::clamp<int64_t>(8192 / a.channels, 16, 128));
  return a;
}

using GroupNormKernel = diffit::Kernels::GroupNormKernel;

// The steps of a kernel over samples cut into chunks: `first` and `last` are by chunk, `between`
// by sample. A thread with whole samples of its own finds each still in its cache in the last step.
void in_steps(const diffit::GroupNorm& a, GroupNormKernel first, GroupNormKernel between,
              GroupNormKernel last) {
  const int64_t chunks = a.samples * a.chunks, numbers = a.samples * a.pixels * a.channels;
  if (a.samples < at::get_num_threads()) {
    run(first, a, chunks, grain(chunks, numbers));
    if (between) run(between, a, a.samples, grain(a.samples, chunks * a.channels));
    run(last, a, chunks, grain(chunks, numbers));
    return;
  }
  at::parallel_for(0, a.samples, grain(a.samples, numbers), [&](int64_t begin, int64_t end) {
    for (int64_t sample = begin; sample < end; ++sample) {
      first(a, sample * a.chunks, (sample + 1) * a.chunks);
      if (between) between(a, sample, sample + 1);
      last(a, sample * a.chunks, (sample + 1) * a.chunks);
    }
  });
}

void group_norm_forward(const Tensor& x, const std::optional<Tensor>& weight,
                        const std::optional<Tensor>& bias, double eps, const Tensor& out,
                        const Tensor& mean, const Tensor& rstd) {
  auto a = group_norm(x, weight, bias, mean, rstd);
  a.eps = static_cast<float>(eps);
  a.out = result(out);
  const Tensor parts = room({a.samples * a.chunks, 2, a.channels});
  a.parts = parts.mutable_data_ptr<float>();
  in_steps(a, kernels().group_norm_statistics, kernels().group_norm_merge,
           kernels().group_norm_normalise);
}

void group_norm_backward(const Tensor& grad_out, const Tensor& x,
                         const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                         const Tensor& mean, const Tensor& rstd, const Tensor& dx,
                         const Tensor& dweight, const Tensor& dbias) {
  auto a = group_norm(x, weight, bias, mean, rstd);
  a.grad_out = pointer(grad_out), a.dx = result(dx);
  const Tensor sums = room({2, a.samples * a.chunks, a.channels});
  a.sum = sums.mutable_data_ptr<float>();
  a.sum_normed = a.sum + a.samples * a.chunks * a.channels;
  in_steps(a, kernels().group_norm_sums, nullptr, kernels().group_norm_input);
  if (dweight.numel()) sum_rows(a.sum_normed, a.samples * a.chunks, dweight);
  if (dbias.numel()) sum_rows(a.sum, a.samples * a.chunks, dbias);
}

}  // namespace

TORCH_LIBRARY(diffit_native, library) {
  library.def("cpu_capability() -> str", &cpu_capability);
  library.def(
      "window_attention_forward(Tensor qkv, Tensor? temb, Tensor? table, int num_heads, int[2] "
      "window, "
      "float scale, Tensor(a!) out) -> ()",
      &window_attention_forward);
  library.def(
      "window_attention_backward(Tensor grad_out, Tensor qkv, Tensor? temb, Tensor? table, "
      "int num_heads, int[2] window, float scale, Tensor(a!) dqkv, Tensor(b!) dtemb, "
      "Tensor(c!) dtable) -> ()",
      &window_attention_backward);
  library.def(
      "adaln_forward(Tensor x, Tensor? y, Tensor? gate, Tensor? shift, Tensor? scale, "
      "Tensor? weight, Tensor? bias, float eps, Tensor(a!) out, Tensor(b!) residual, "
      "Tensor(c!) mean, Tensor(d!) rstd) -> ()",
      &adaln_forward);
  library.def(
      "adaln_backward(Tensor grad_out, Tensor? grad_residual, Tensor residual, Tensor? y, "
      "Tensor? gate, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor rstd, Tensor(a!) dx, Tensor(b!) dy, Tensor(c!) dgate, Tensor(d!) dshift, "
      "Tensor(e!) dscale, Tensor(f!) dweight, Tensor(g!) dbias) -> ()",
      &adaln_backward);
  library.def(
      "linear(Tensor left, Tensor right, bool transposed, Tensor? bias, Tensor(a!) out) -> ()",
      &linear);
  library.def("gelu_forward(Tensor hidden, Tensor(a!) activation, bool exact) -> ()",
              &gelu_forward);
  library.def(
      "gelu_backward(Tensor hidden, Tensor(a!) activation, Tensor(b!) grad, Tensor(c!) dbias, "
      "bool exact) -> ()",
      &gelu_backward);
  library.def(
      "group_norm_forward(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor(a!) out, "
      "Tensor(b!) mean, Tensor(c!) rstd) -> ()",
      &group_norm_forward);
  library.def(
      "group_norm_backward(Tensor grad_out, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor rstd, Tensor(a!) dx, Tensor(b!) dweight, Tensor(c!) dbias) -> ()",
      &group_norm_backward);
}
