// Every CPU kernel on buffers of exactly the sizes that it is promised, for the sanitizers to
// watch: odd sizes, every type of number, tensors left out. What is computed is not looked at.
#include <cstdio>
#include <memory>
#include <vector>

#include "cpu/kernels.h"

using namespace diffit;

namespace {

// Memory that ends where its last number ends.
class Buffers {
 public:
  void* make(int64_t count, Number number) {
    const int64_t bytes = count * (number == Number::kFloat32 ? 4 : 2);
    auto& buffer = all_.emplace_back(new char[bytes]);
    if (number == Number::kFloat32) {
      for (int64_t i = 0; i < count; ++i) reinterpret_cast<float*>(buffer.get())[i] = next();
    } else {  // between 0 and 2, in either format
      for (int64_t i = 0; i < count; ++i) {
        reinterpret_cast<uint16_t*>(buffer.get())[i] = 0x3c00 + (i * 37) % 64;
      }
    }
    return buffer.get();
  }
  float* floats(int64_t count) { return static_cast<float*>(make(count, Number::kFloat32)); }
  void clear() { all_.clear(); }

 private:
  float next() {
    state_ = state_ * 1664525u + 1013904223u;
    return (state_ >> 8) * (2.0f / (1 << 24)) - 1.0f;
  }
  uint32_t state_ = 1;
  std::vector<std::unique_ptr<char[]>> all_;
};

Buffers buffers;
constexpr Number kNumbers[] = {Number::kFloat32, Number::kBFloat16, Number::kFloat16};

void window_attention(const Kernels& kernels) {
  struct {
    int64_t batch, height, width, heads, head_dim, window_height, window_width;
  } const shapes[] = {
      {2, 16, 16, 1, 72, 16, 16}, {2, 8, 4, 2, 32, 4, 4},     {1, 7, 14, 3, 8, 7, 7},
      {2, 3, 3, 2, 5, 1, 1},      {1, 20, 20, 1, 40, 20, 20}, {2, 6, 20, 2, 16, 3, 5},
      {1, 3, 32, 1, 128, 3, 32},  {3, 2, 2, 2, 24, 2, 2},
  };
  for (const auto& s : shapes) {
    for (Number number : kNumbers) {
      for (bool with : {true, false}) {
        const int64_t channels = s.heads * s.head_dim, tokens = s.batch * s.height * s.width;
        WindowAttention a{};
        a.number = number;
        a.batch = s.batch, a.height = s.height, a.width = s.width;
        a.heads = s.heads, a.head_dim = s.head_dim;
        a.window_height = s.window_height, a.window_width = s.window_width;
        a.scale = 0.3f;
        a.groups = (a.windows() + 1) / 2;
        const int64_t table = a.table_size() * a.heads;
        a.qkv = buffers.make(tokens * 3 * channels, number);
        a.out = buffers.make(tokens * channels, number);
        a.grad_out = buffers.make(tokens * channels, number);
        a.dqkv = buffers.make(tokens * 3 * channels, number);
        if (with) {
          a.temb = buffers.floats(s.batch * 2 * channels);
          a.table = buffers.floats(table);
          a.dtemb = buffers.floats(a.windows() * 2 * channels);
          a.dtable = buffers.floats(a.groups * table);
        }
        kernels.window_attention_forward(a, 0, forward_tasks(a));
        kernels.window_attention_backward(a, 0, backward_tasks(a));
        buffers.clear();
      }
    }
  }
}

Number other_than(Number number) {
  return number == Number::kFloat32 ? Number::kBFloat16 : Number::kFloat32;
}

Modulation modulation(Number number, int64_t samples, int64_t tokens, int64_t channels,
                      bool per_token) {
  const int64_t count = samples * (per_token ? tokens : 1) * channels;
  return {buffers.make(count, number), number, per_token ? tokens * channels : channels,
          per_token ? channels : 0, buffers.make(count, number)};
}

void adaln(const Kernels& kernels) {
  struct {
    int64_t samples, tokens, channels, chunks;
  } const shapes[] = {{2, 9, 72, 2}, {1, 1, 1, 1}, {3, 4, 33, 1}, {1, 33, 200, 4}};
  for (const auto& s : shapes) {
    for (Number number : kNumbers) {
      for (Number parameters : {number, other_than(number)}) {
        for (bool with : {true, false}) {
          for (bool per_token : {true, false}) {
            const int64_t rows = s.samples * s.tokens, count = rows * s.channels;
            AdaLN a{};
            a.number = number;
            a.samples = s.samples, a.tokens = s.tokens, a.channels = s.channels;
            a.chunks = s.chunks, a.eps = 1e-6f;
            a.x = buffers.make(count, number);
            a.out = buffers.make(count, number);
            a.mean = buffers.floats(rows), a.rstd = buffers.floats(rows);
            a.grad_out = buffers.make(count, number);
            a.dx = buffers.make(count, number);
            if (with) {
              a.y = {buffers.make(count, parameters), parameters};
              a.residual = buffers.make(count, number);
              a.grad_residual = buffers.make(count, number);
              a.dy = buffers.make(count, parameters);
              for (Modulation* m : {&a.gate, &a.shift, &a.scale}) {
                *m = modulation(parameters, s.samples, s.tokens, s.channels, per_token);
              }
              a.weight = {buffers.make(s.channels, parameters), parameters};
              a.bias = {buffers.make(s.channels, parameters), parameters};
              a.dweight = buffers.make(s.channels, parameters);
              a.dbias = buffers.make(s.channels, parameters);
              const int64_t sums = s.samples * s.chunks * s.channels;
              a.sum = buffers.floats(sums), a.sum_normed = buffers.floats(sums);
              if (!per_token) a.sum_branch = buffers.floats(sums);
            }
            kernels.adaln_forward(a, 0, (rows + kAdaLNRows - 1) / kAdaLNRows);
            if (a.residual) a.x = a.residual;
            kernels.adaln_backward(a, 0, s.samples * s.chunks);
            if (with) kernels.adaln_sums(a, 0, (s.channels + kSumColumns - 1) / kSumColumns);
            buffers.clear();
          }
        }
      }
    }
  }
}

void linear(const Kernels& kernels) {
  struct {
    int64_t rows, columns, terms, blocks;
  } const shapes[] = {{1, 1, 1, 1}, {7, 33, 17, 2}, {8, 32, 96, 1}, {21, 65, 200, 3}};
  for (const auto& s : shapes) {
    for (bool transposed : {true, false}) {
      for (bool with_bias : {true, false}) {
        Linear a{};
        a.rows = s.rows, a.columns = s.columns, a.terms = s.terms, a.blocks = s.blocks;
        a.left = buffers.floats(s.rows * s.terms);
        a.right = buffers.floats(s.terms * s.columns);
        a.transposed = transposed;
        a.bias = with_bias ? buffers.floats(s.columns) : nullptr;
        a.out = buffers.floats(s.rows * s.columns);
        const int64_t panels = (s.columns + kernels.linear_columns - 1) / kernels.linear_columns;
        kernels.linear(a, 0, panels * s.blocks);
        buffers.clear();
      }
    }
  }
}

void gelu(const Kernels& kernels) {
  struct {
    int64_t rows, columns, chunks;
  } const shapes[] = {{1, 1, 1}, {7, 33, 3}, {40, 520, 2}};
  for (const auto& s : shapes) {
    for (Number number : kNumbers) {
      for (bool exact : {true, false}) {
        Gelu a{};
        a.number = number, a.exact = exact;
        a.rows = s.rows, a.columns = s.columns, a.chunks = s.chunks;
        const int64_t count = s.rows * s.columns;
        a.hidden = buffers.make(count, number);
        a.activation = buffers.make(count, number);
        a.grad = buffers.make(count, number);
        a.sum = buffers.floats(s.chunks * s.columns);
        kernels.gelu_forward(a, 0, (count + kGeluBlock - 1) / kGeluBlock);
        kernels.gelu_backward(a, 0, s.chunks);
        const SumRows sums{a.sum, s.chunks, s.columns, buffers.make(s.columns, number), number};
        kernels.sum_rows(sums, 0, (s.columns + kSumColumns - 1) / kSumColumns);
        buffers.clear();
      }
    }
  }
}

void group_norm(const Kernels& kernels) {
  struct {
    int64_t samples, pixels, channels, groups, chunks;
  } const shapes[] = {{2, 30, 48, 4, 2}, {1, 1, 1, 1, 1}, {3, 7, 33, 3, 1}, {1, 64, 200, 8, 4}};
  for (const auto& s : shapes) {
    for (Number number : kNumbers) {
      for (bool with : {true, false}) {
        GroupNorm a{};
        a.number = number, a.eps = 1e-5f;
        a.samples = s.samples, a.pixels = s.pixels, a.channels = s.channels, a.groups = s.groups;
        a.chunks = s.chunks;
        const int64_t count = s.samples * s.pixels * s.channels, tasks = s.samples * s.chunks;
        a.x = buffers.make(count, number);
        a.out = buffers.make(count, number);
        a.grad_out = buffers.make(count, number);
        a.dx = buffers.make(count, number);
        if (with) {
          a.weight = {buffers.make(s.channels, number), number};
          a.bias = {buffers.make(s.channels, other_than(number)), other_than(number)};
        }
        a.mean = buffers.floats(s.samples * s.groups),
        a.rstd = buffers.floats(s.samples * s.groups);
        a.parts = buffers.floats(tasks * 2 * s.channels);
        a.sum = buffers.floats(tasks * s.channels);
        a.sum_normed = buffers.floats(tasks * s.channels);
        kernels.group_norm_statistics(a, 0, tasks);
        kernels.group_norm_merge(a, 0, s.samples);
        kernels.group_norm_normalise(a, 0, tasks);
        kernels.group_norm_sums(a, 0, tasks);
        kernels.group_norm_input(a, 0, tasks);
        buffers.clear();
      }
    }
  }
}

}  // namespace

int main() {
  window_attention(kernels());
  adaln(kernels());
  linear(kernels());
  gelu(kernels());
  group_norm(kernels());
  std::printf("%s\n", kernels().name);
}
