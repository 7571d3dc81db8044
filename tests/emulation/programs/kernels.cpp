// The CUDA kernels on buffers of exactly the sizes that they are promised, for the sanitizers to
// watch: every launcher, odd shapes, tensors left out. What is computed is looked at only for NaN:
// memory is NaN before it is written.
#include "cuda/kernels.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

using namespace diffit;
using namespace diffit::cuda;

namespace {

int bytes_of(Number number) { return number == Number::kFloat32 ? 4 : 2; }

// Memory that ends where its last number ends, as malloc aligns it.
class Buffers {
 public:
  // Between 0 and 2 in either half-precision format; or NaN.
  void* make(int64_t count, Number number, bool written = true) {
    auto& buffer = all_.emplace_back(new char[count * bytes_of(number)], count, number);
    std::memset(buffer.data.get(), 0xff, count * bytes_of(number));
    for (int64_t i = 0; written && i < count; ++i) {
      if (number == Number::kFloat32) {
        reinterpret_cast<float*>(buffer.data.get())[i] = 0.01f * (i * 37 % 64);
      } else {
        reinterpret_cast<uint16_t*>(buffer.data.get())[i] = 0x3c00 + i * 37 % 64;
      }
    }
    return buffer.data.get();
  }
  float* room(int64_t count) { return static_cast<float*>(make(count, Number::kFloat32, false)); }
  // Whether a number of a buffer is NaN.
  static bool has_nan(const void* data, int64_t count, Number number) {
    for (int64_t i = 0; i < count; ++i) {
      if (number == Number::kFloat32) {
        if (std::isnan(static_cast<const float*>(data)[i])) return true;
      } else {
        const int exponent = number == Number::kBFloat16 ? 0x7f80 : 0x7c00;
        if ((static_cast<const uint16_t*>(data)[i] & 0x7fff) > exponent) return true;
      }
    }
    return false;
  }

 private:
  struct Buffer {
    std::unique_ptr<char[]> data;
    int64_t count;
    Number number;
    Buffer(char* data, int64_t count, Number number) : data(data), count(count), number(number) {}
  };
  std::vector<Buffer> all_;
};

int failures = 0;

void expect(bool good, const char* what, int shape) {
  if (good) return;
  std::printf("%s has NaN in shape %d\n", what, shape);
  ++failures;
}

void window_attention() {
  struct {
    int batch, height, width, heads, head_dim, window_height, window_width;
  } const shapes[] = {
      {2, 8, 4, 2, 32, 4, 4},    {1, 7, 14, 1, 72, 7, 7},  {3, 2, 9, 1, 64, 1, 3},
      {1, 6, 4, 2, 96, 6, 4},    {1, 9, 9, 1, 72, 9, 9},   {1, 5, 32, 1, 32, 5, 32},
      {1, 8, 8, 1, 128, 8, 8},   {2, 8, 16, 1, 72, 8, 16}, {1, 16, 8, 1, 96, 16, 8},
      {1, 4, 32, 1, 128, 4, 32}, {1, 8, 16, 1, 32, 8, 16},
  };
  int index = 0;
  for (const auto& s : shapes) {
    for (const bool with : {true, false}) {
      for (const Family family : {Family::kTensorCores, Family::kHopper}) {
        Buffers buffers;
        WindowAttention a{};
        a.number = with ? Number::kBFloat16 : Number::kFloat16;
        a.batch = s.batch, a.height = s.height, a.width = s.width;
        a.heads = s.heads, a.head_dim = s.head_dim;
        a.window_height = s.window_height, a.window_width = s.window_width;
        a.scale = 0.1f;
        const int64_t tokens = int64_t{s.batch} * s.height * s.width, channels = a.channels();
        const int64_t table = int64_t{a.table_size()} * s.heads, temb = 2 * s.batch * channels;
        a.qkv = buffers.make(tokens * 3 * channels, a.number);
        if (with) a.temb = {buffers.make(temb, a.number), a.number};
        if (with) a.table = {buffers.make(table, Number::kFloat32), Number::kFloat32};
        // With the time token and the table Hopper's do everything that they do without, and more.
        if (family == Family::kHopper && (!with || !hopper_serves(a))) continue;
        a.out = buffers.make(tokens * channels, a.number, false);
        a.lse = buffers.room(tokens * s.heads);
        window_attention_forward(a, family, nullptr);
        expect(!Buffers::has_nan(a.out, tokens * channels, a.number), "out", index);
        expect(!Buffers::has_nan(a.lse, tokens * s.heads, Number::kFloat32), "lse", index);

        a.grad_out = buffers.make(tokens * channels, a.number);
        a.dqkv = buffers.make(tokens * 3 * channels, a.number, false);
        if (with) a.dtemb = buffers.make(temb, a.number, false);
        if (with) a.dtable = buffers.make(table, Number::kFloat32, false);
        a.scratch = buffers.room(backward_scratch(a, family));
        window_attention_backward(a, family, nullptr);
        expect(!Buffers::has_nan(a.dqkv, tokens * 3 * channels, a.number), "dqkv", index);
        if (!with) continue;
        expect(!Buffers::has_nan(a.dtemb, temb, a.number), "dtemb", index);
        expect(!Buffers::has_nan(a.dtable, table, Number::kFloat32), "dtable", index);
      }
    }
    ++index;
  }
}

void adaln() {
  struct {
    int samples, tokens, channels;
  } const shapes[] = {{2, 5, 72}, {1, 3, 1}, {3, 7, 33}, {2, 40, 1152}, {1, 2, 5000}};
  int index = 0;
  for (const auto& s : shapes) {
    for (const Number number : {Number::kFloat32, Number::kBFloat16, Number::kFloat16}) {
      for (const bool per_token : {false, true}) {
        Buffers buffers;
        const int64_t rows = int64_t{s.samples} * s.tokens, count = rows * s.channels;
        const int64_t modulated = per_token ? count : int64_t{s.samples} * s.channels;
        AdaLN a{};
        a.number = number;
        a.samples = s.samples, a.tokens = s.tokens, a.channels = s.channels, a.eps = 1e-6f;
        a.x = buffers.make(count, number), a.y = {buffers.make(count, number), number};
        for (Modulation* m : {&a.gate, &a.shift, &a.scale}) {
          *m = {buffers.make(modulated, number), number,
                int64_t{s.channels} * (per_token ? s.tokens : 1), per_token ? s.channels : 0,
                nullptr};
        }
        a.weight = {buffers.make(s.channels, number), number};
        a.bias = {buffers.make(s.channels, number), number};
        a.out = buffers.make(count, number, false);
        a.residual = buffers.make(count, number, false);
        a.mean = buffers.room(rows), a.rstd = buffers.room(rows);
        adaln_forward(a, nullptr);
        expect(!Buffers::has_nan(a.out, count, number), "adaln's out", index);
        expect(!Buffers::has_nan(a.residual, count, number), "adaln's residual", index);

        a.x = a.residual;
        a.grad_out = buffers.make(count, number), a.grad_residual = buffers.make(count, number);
        a.dx = buffers.make(count, number, false), a.dy = buffers.make(count, number, false);
        a.dweight = buffers.make(s.channels, number, false);
        a.dbias = buffers.make(s.channels, number, false);
        for (Modulation* m : {&a.gate, &a.shift, &a.scale}) {
          m->grad = buffers.make(modulated, number, false);
        }
        a.scratch = buffers.room(backward_scratch(a));
        adaln_backward(a, nullptr);
        expect(!Buffers::has_nan(a.dx, count, number), "adaln's dx", index);
        expect(!Buffers::has_nan(a.dy, count, number), "adaln's dy", index);
        expect(!Buffers::has_nan(a.dweight, s.channels, number), "dweight", index);
        expect(!Buffers::has_nan(a.dbias, s.channels, number), "dbias", index);
        for (const Modulation* m : {&a.gate, &a.shift, &a.scale}) {
          expect(!Buffers::has_nan(m->grad, modulated, number), "a modulation's gradient", index);
        }
      }
    }
    ++index;
  }
}

}  // namespace

int main() {
  window_attention();
  adaln();
  std::printf(failures ? "%d results have NaN\n" : "no NaN\n", failures);
  return failures != 0;
}
