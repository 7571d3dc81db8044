// The launcher of the forward. Windows of up to 16, 32 and 64 tokens share a tile of 64 queries by
// four, by two and alone. Larger ones take tiles of 128 queries, so that every key that a warp
// loads from shared memory is used twice, where registers allow: up to 72 channels.
#include "cuda/dispatch.cuh"
#include "cuda/window_attention.cuh"

namespace diffit::cuda {
namespace {

template <class E, int D, int M, int KEYS>
void forward(const WindowAttention& a, void* stream) {
  const Description what = describe("window_attention_forward", a);
  const auto kernel = window_attention_forward_kernel<E, D, M, KEYS>;
  const Windows windows(a);
  const auto shared_bytes = [&](int stages) { return forward_shared<D, M>(windows, stages); };
  const int items = KEYS < kTileKeys ? (windows.count + kTileKeys / KEYS - 1) / (kTileKeys / KEYS)
                                     : windows.count * ((windows.tokens + 64 * M - 1) / (64 * M));
  const Walk walk = walk_over(items, a.heads, kernel, shared_bytes, what);
  launch(kernel, ForwardArguments{a, windows, walk}, dim3(walk.splits * a.heads), kThreads,
         shared_bytes(walk.stages), stream, what);
}

}  // namespace

void window_attention_forward(const WindowAttention& a, Family family, void* stream) {
  if (family == Family::kHopper) return window_attention_forward_hopper(a, stream);
  with_element_and_head_dim(a, [&](auto element, auto head_dim) {
    using E = decltype(element);
    constexpr int D = head_dim.value;
    if (a.tokens() <= 16) return forward<E, D, 1, 16>(a, stream);
    if (a.tokens() <= 32) return forward<E, D, 1, 32>(a, stream);
    if (a.tokens() <= 64) return forward<E, D, 1, 64>(a, stream);
    return forward<E, D, D <= 72 ? 2 : 1, 64>(a, stream);
  });
}

}  // namespace diffit::cuda
