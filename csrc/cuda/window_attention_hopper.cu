// The launcher of the forward for Hopper.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/dispatch.cuh"
#include "cuda/window_attention_hopper_compute.cuh"

namespace diffit::cuda {
namespace {

// Stages that there is room for.
template <int D, int W>
int stages_of(const WindowAttention& a) {
  int stages = kHopperMaxStages;
  while (stages > 0 && HopperShared<D>::bytes(stages, HopperBiases<W>::bytes(a.window_height)) >
                           kHopperSharedMemory) {
    --stages;
  }
  return stages;
}

template <class E, int D, int W>
void forward(const WindowAttention& a, void* stream) {
  const int blocks = a.tokens() / kHopperTokens, stages = stages_of<D, W>(a);
  const int room = std::max(1, multiprocessors() / a.heads);
  // Keys and values stay for all blocks of queries of a window if they fit, and if that does not
  // leave multiprocessors without work.
  const auto steps = [&](int items, int each) { return (items + room - 1) / room * each; };
  const bool stay =
      blocks <= stages && steps(a.windows(), blocks) <= steps(a.windows() * blocks, 1);
  const int reuse = stay ? blocks : 1, items = a.windows() * blocks / reuse;
  const int each = (items + room - 1) / room, workers = (items + each - 1) / each;
  const HopperWalk walk{workers, blocks, reuse, items, stages, a.windows_of_sample(), a.width / W};
  const TileMaps qkv = HopperTile<D, kHopperTokens>::maps(a.qkv, a.number, 3 * a.channels(), a, W,
                                                          kHopperTokens / W);
  constexpr int kOutWidth = W < 16 ? W : 16;
  const TileMaps out =
      HopperTile<D, 16>::maps(a.out, a.number, a.channels(), a, kOutWidth, 16 / kOutWidth);
  launch(window_attention_forward_hopper_kernel<E, D, W>, HopperForwardArguments{a, walk, qkv, out},
         dim3(workers * a.heads), kHopperThreads,
         HopperShared<D>::bytes(stages, HopperBiases<W>::bytes(a.window_height)), stream,
         describe("window_attention_forward for Hopper", a));
}

}  // namespace

bool hopper_serves(const WindowAttention& a) {
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  const int w = a.window_width, d = a.head_dim;
  if (a.number == Number::kFloat32 || (w != 8 && w != 16 && w != 32) ||
      a.tokens() % kHopperTokens != 0 || (d != 32 && d != 64 && d != 72 && d != 96 && d != 128) ||
      !hopper_serves_scale(a.scale) || !aligned(a.qkv) || !aligned(a.out) ||
      int64_t{6} * a.channels() * a.width * a.height >= int64_t{1} << 40) {
    return false;
  }
  int stages = 0;
  with_element_and_head_dim(a, [&](auto, auto head_dim) {
    with_width(w, [&](auto width) { stages = stages_of<head_dim.value, width.value>(a); });
  });
  return stages >= 2;
}

void window_attention_forward_hopper(const WindowAttention& a, void* stream) {
  if (a.windows() == 0) return;
  with_element_and_head_dim(a, [&](auto element, auto head_dim) {
    with_width(a.window_width, [&](auto width) {
      forward<decltype(element), head_dim.value, width.value>(a, stream);
    });
  });
}

}  // namespace diffit::cuda
