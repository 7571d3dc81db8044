// Every op of the CUDA library, and its one file that includes torch: of torch's core alone, so
// that it compiles beside a torch without CUDA too. The ops take contiguous tensors of the shapes
// that diffit_kernels/ops/<stage>/native*.py makes, and write into those it allocated, on the
// current stream of the tensors' device. Compiled with DIFFIT_EMULATED, beside kernels that run on
// the host, the ops take tensors on the CPU.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <cstdint>
#include <limits>
#include <optional>

#include "cuda/kernels.h"

namespace {

using at::Tensor;
using diffit::Number;
namespace cuda = diffit::cuda;

#ifdef DIFFIT_EMULATED
constexpr auto kDevice = c10::DeviceType::CPU;
void* current_stream(const Tensor&) { return nullptr; }
#else
constexpr auto kDevice = c10::DeviceType::CUDA;
void* current_stream(const Tensor& tensor) {
  return c10::impl::VirtualGuardImpl(kDevice).getStream(tensor.device()).native_handle();
}
#endif

Number number_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Number::kFloat32;
    case at::kBFloat16:
      return Number::kBFloat16;
    case at::kHalf:
      return Number::kFloat16;
    default:
      TORCH_CHECK(false, "CUDA kernels take float32, bfloat16 and float16, got ",
                  tensor.scalar_type(), " of shape ", tensor.sizes());
  }
}

// It is on a GPU, and on the one that is current.
void check_device(const Tensor& tensor, const c10::Device& device) {
  TORCH_CHECK(tensor.device().type() == kDevice, "CUDA kernels take tensors on a GPU, got shape ",
              tensor.sizes(), " on ", tensor.device());
  TORCH_CHECK(tensor.device() == device, "CUDA kernels take tensors on one GPU, got shape ",
              tensor.sizes(), " on ", tensor.device(), " beside another on ", device);
}

// Kernels can read and write it: it is contiguous as well.
void check_place(const Tensor& tensor, const c10::Device& device) {
  check_device(tensor, device);
  TORCH_CHECK(tensor.is_contiguous(), "CUDA kernels take contiguous tensors, got shape ",
              tensor.sizes(), " with strides ", tensor.strides());
}

int size(const Tensor& tensor, int64_t dimension) {
  const int64_t size = tensor.size(dimension);
  TORCH_CHECK(size <= std::numeric_limits<int>::max(),
              "too large for CUDA kernels: ", tensor.sizes());
  return static_cast<int>(size);
}

// Where a result is written: nowhere if it is left out, which a tensor without elements says.
template <class T = void>
T* result(const Tensor& tensor) {
  return tensor.numel() ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

cuda::Input input(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return {};
  return {tensor->const_data_ptr(), number_of(*tensor)};
}

// Room for so many float32 numbers on the device of `like`.
Tensor room(const Tensor& like, int64_t numbers) {
  return at::empty({numbers}, like.options().dtype(at::kFloat));
}

// ---- window_attention --------------------------------------------------------------------------

cuda::WindowAttention window_attention(const Tensor& qkv, const std::optional<Tensor>& temb,
                                       const std::optional<Tensor>& table, int64_t num_heads,
                                       at::IntArrayRef window, double scale) {
  check_place(qkv, qkv.device());
  if (temb.has_value()) check_place(*temb, qkv.device());
  if (table.has_value()) check_place(*table, qkv.device());
  cuda::WindowAttention a{};
  a.number = number_of(qkv);
  TORCH_CHECK(a.number != Number::kFloat32, "window_attention takes bfloat16 and float16, got ",
              qkv.scalar_type(), " of shape ", qkv.sizes());
  a.batch = size(qkv, 0), a.height = size(qkv, 1), a.width = size(qkv, 2);
  a.heads = static_cast<int>(num_heads), a.head_dim = size(qkv, 3) / 3 / a.heads;
  a.window_height = static_cast<int>(window[0]), a.window_width = static_cast<int>(window[1]);
  a.scale = static_cast<float>(scale);
  a.qkv = qkv.const_data_ptr(), a.temb = input(temb), a.table = input(table);
  return a;
}

cuda::Family family(bool hopper) {
  return hopper ? cuda::Family::kHopper : cuda::Family::kTensorCores;
}

bool window_attention_hopper_serves(const Tensor& qkv, const std::optional<Tensor>& temb,
                                    const std::optional<Tensor>& table, int64_t num_heads,
                                    at::IntArrayRef window, double scale) {
  const c10::DeviceGuard guard(qkv.device());
  return cuda::hopper_serves(window_attention(qkv, temb, table, num_heads, window, scale));
}

void window_attention_forward(const Tensor& qkv, const std::optional<Tensor>& temb,
                              const std::optional<Tensor>& table, int64_t num_heads,
                              at::IntArrayRef window, double scale, bool hopper, const Tensor& out,
                              const Tensor& lse) {
  const c10::DeviceGuard guard(qkv.device());
  auto a = window_attention(qkv, temb, table, num_heads, window, scale);
  for (const Tensor& tensor : {out, lse}) check_place(tensor, qkv.device());
  a.out = result(out), a.lse = result<float>(lse);
  cuda::window_attention_forward(a, family(hopper), current_stream(qkv));
}

void window_attention_backward(const Tensor& grad_out, const Tensor& qkv,
                               const std::optional<Tensor>& temb,
                               const std::optional<Tensor>& table, const Tensor& out,
                               const Tensor& lse, int64_t num_heads, at::IntArrayRef window,
                               double scale, bool hopper, const Tensor& dqkv, const Tensor& dtemb,
                               const Tensor& dtable) {
  const c10::DeviceGuard guard(qkv.device());
  auto a = window_attention(qkv, temb, table, num_heads, window, scale);
  for (const Tensor& tensor : {grad_out, out, lse, dqkv, dtemb, dtable}) {
    check_place(tensor, qkv.device());
  }
  a.grad_out = grad_out.const_data_ptr(), a.out = out.data_ptr(), a.lse = lse.data_ptr<float>();
  a.dqkv = result(dqkv), a.dtemb = result(dtemb), a.dtable = result(dtable);
  const Tensor scratch = room(qkv, cuda::backward_scratch(a, family(hopper)));
  a.scratch = result<float>(scratch);
  cuda::window_attention_backward(a, family(hopper), current_stream(qkv));
}

// ---- adaln -------------------------------------------------------------------------------------

// A row per sample, which may be a slice of a wider one, or a contiguous one per token.
cuda::Modulation modulation(const std::optional<Tensor>& tensor, const Tensor& x) {
  if (!tensor.has_value()) return {};
  const bool per_token = tensor->size(1) != 1;
  if (per_token || tensor->stride(2) != 1) check_place(*tensor, x.device());
  check_device(*tensor, x.device());
  return {tensor->const_data_ptr(), number_of(*tensor), tensor->stride(0),
          per_token ? tensor->stride(1) : 0, nullptr};
}

cuda::AdaLN adaln(const Tensor& x, const std::optional<Tensor>& y,
                  const std::optional<Tensor>& gate, const std::optional<Tensor>& shift,
                  const std::optional<Tensor>& scale, const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& rstd) {
  for (const Tensor& tensor : {x, mean, rstd}) check_place(tensor, x.device());
  for (const auto& tensor : {y, weight, bias}) {
    if (tensor.has_value()) check_place(*tensor, x.device());
  }
  cuda::AdaLN a{};
  a.number = number_of(x);
  a.samples = size(x, 0), a.tokens = size(x, 1), a.channels = size(x, 2);
  a.x = x.const_data_ptr(), a.y = input(y);
  a.gate = modulation(gate, x), a.shift = modulation(shift, x), a.scale = modulation(scale, x);
  a.weight = input(weight), a.bias = input(bias);
  a.mean = mean.mutable_data_ptr<float>(), a.rstd = rstd.mutable_data_ptr<float>();
  return a;
}

void adaln_forward(const Tensor& x, const std::optional<Tensor>& y,
                   const std::optional<Tensor>& gate, const std::optional<Tensor>& shift,
                   const std::optional<Tensor>& scale, const std::optional<Tensor>& weight,
                   const std::optional<Tensor>& bias, double eps, const Tensor& out,
                   const Tensor& residual, const Tensor& mean, const Tensor& rstd) {
  const c10::DeviceGuard guard(x.device());
  auto a = adaln(x, y, gate, shift, scale, weight, bias, mean, rstd);
  for (const Tensor& tensor : {out, residual}) check_place(tensor, x.device());
  a.eps = static_cast<float>(eps);
  a.out = result(out), a.residual = result(residual);
  cuda::adaln_forward(a, current_stream(x));
}

void adaln_backward(const Tensor& grad_out, const std::optional<Tensor>& grad_residual,
                    const Tensor& residual, const std::optional<Tensor>& y,
                    const std::optional<Tensor>& gate, const std::optional<Tensor>& shift,
                    const std::optional<Tensor>& scale, const std::optional<Tensor>& weight,
                    const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& rstd,
                    const Tensor& dx, const Tensor& dy, const Tensor& dgate, const Tensor& dshift,
                    const Tensor& dscale, const Tensor& dweight, const Tensor& dbias) {
  const c10::DeviceGuard guard(residual.device());
  auto a = adaln(residual, y, gate, shift, scale, weight, bias, mean, rstd);
  for (const Tensor& tensor : {grad_out, dx, dy, dgate, dshift, dscale, dweight, dbias}) {
    check_place(tensor, residual.device());
  }
  if (grad_residual.has_value()) check_place(*grad_residual, residual.device());
  a.grad_out = grad_out.const_data_ptr(), a.grad_residual = input(grad_residual).data;
  a.dx = result(dx), a.dy = result(dy), a.dweight = result(dweight), a.dbias = result(dbias);
  a.gate.grad = result(dgate), a.shift.grad = result(dshift), a.scale.grad = result(dscale);
  const Tensor scratch = room(residual, cuda::backward_scratch(a));
  a.scratch = result<float>(scratch);
  cuda::adaln_backward(a, current_stream(residual));
}

}  // namespace

TORCH_LIBRARY(diffit_cuda, library) {
  library.def(
      "window_attention_hopper_serves(Tensor qkv, Tensor? temb, Tensor? table, int num_heads, "
      "int[2] window, float scale) -> bool",
      &window_attention_hopper_serves);
  library.def(
      "window_attention_forward(Tensor qkv, Tensor? temb, Tensor? table, int num_heads, "
      "int[2] window, float scale, bool hopper, Tensor(a!) out, Tensor(b!) lse) -> ()",
      &window_attention_forward);
  library.def(
      "window_attention_backward(Tensor grad_out, Tensor qkv, Tensor? temb, Tensor? table, "
      "Tensor out, Tensor lse, int num_heads, int[2] window, float scale, bool hopper, "
      "Tensor(a!) dqkv, Tensor(b!) dtemb, Tensor(c!) dtable) -> ()",
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
}
