// The launcher of the backward of windows of up to 64 tokens.
#include "cuda/dispatch.cuh"
#include "cuda/window_attention_backward_small.cuh"

namespace diffit::cuda {
namespace {

template <class E, int D, int KEYS>
void launch_small(BackwardArguments arguments, int splits, void* stream) {
  const WindowAttention& a = arguments.a;
  const auto kernel = window_attention_backward_small_kernel<E, D, KEYS>;
  const auto shared_bytes = [&](int stages) {
    return small_backward_shared<D, KEYS>(arguments.windows, stages);
  };
  constexpr int kWindows = 64 / KEYS;
  arguments.walk = {(a.windows() + kWindows - 1) / kWindows, splits,
                    shared_bytes(2) <= shared_memory_limit() ? 2 : 1};
  launch(kernel, arguments, dim3(arguments.walk.splits * a.heads), kThreads,
         shared_bytes(arguments.walk.stages), stream,
         describe("window_attention_backward_small", a));
}

}  // namespace

void small_backward(const BackwardArguments& arguments, int splits, void* stream) {
  const int tokens = arguments.windows.tokens;
  with_element_and_head_dim(arguments.a, [&](auto element, auto head_dim) {
    using E = decltype(element);
    constexpr int D = head_dim.value;
    if (tokens <= 16) return launch_small<E, D, 16>(arguments, splits, stream);
    if (tokens <= 32) return launch_small<E, D, 32>(arguments, splits, stream);
    if constexpr (has_small_kernel(64, D)) {
      return launch_small<E, D, 64>(arguments, splits, stream);
    }
  });
}

}  // namespace diffit::cuda
