// Every CPU kernel on buffers of exactly the sizes that it is promised, for the sanitizers to watch:
// odd sizes, every type of number, tensors left out. What is computed is not looked at.
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
      {2, 16, 16, 1, 72, 16, 16}, {2, 8, 4, 2, 32, 4, 4},  {1, 7, 14, 3, 8, 7, 7},
      {2, 3, 3, 2, 5, 1, 1},      {1, 20, 20, 1, 40, 20, 20}, {2, 6, 20, 2, 16, 3, 5},
      {1, 3, 32, 1, 128, 3, 32},  {3, 2, 2, 2, 24, 2, 2},
  };
  for (const auto& s : shapes) {
    for (Number number : kNumbers) {
      for (bool with : {true, false}) {
        const int64_t channels = s.heads * s.head_dim, tokens = s.batch * s.height * s.width;
        const int64_t table = (2 * s.window_height - 1) * (2 * s.window_width - 1) * s.heads;
        const int64_t windows = tokens / (s.window_height * s.window_width);
        WindowAttention a{};
        a.number = number;
        a.batch = s.batch, a.height = s.height, a.width = s.width;
        a.heads = s.heads, a.head_dim = s.head_dim;
        a.window_height = s.window_height, a.window_width = s.window_width;
        a.scale = 0.3f;
        a.groups = (windows + 1) / 2;
        a.qkv = buffers.make(tokens * 3 * channels, number);
        a.out = buffers.make(tokens * channels, number);
        a.grad_out = buffers.make(tokens * channels, number);
        a.dqkv = buffers.make(tokens * 3 * channels, number);
        if (with) {
          a.temb = buffers.floats(s.batch * 2 * channels);
          a.table = buffers.floats(table);
          a.dtemb = buffers.floats(windows * 2 * channels);
          a.dtable = buffers.floats(a.groups * table);
        }
        kernels.window_attention_forward(a, 0, forward_tasks(a));
        kernels.window_attention_backward(a, 0, a.groups * a.heads);
        buffers.clear();
      }
    }
  }
}

}  // namespace

int main() {
  window_attention(kernels());
  std::printf("%s\n", kernels().name);
}
