// The launchers of the backward of windows of several tiles.
#include "cuda/dispatch.cuh"
#include "cuda/window_attention_backward_large.cuh"
#include "cuda/window_attention_backward_table.cuh"

namespace diffit::cuda {
namespace {

template <class E, int D>
void launch_large(BackwardArguments arguments, int table_splits, void* stream) {
  const WindowAttention& a = arguments.a;
  const Windows& windows = arguments.windows;
  const int tiles = window_tiles(windows);
  const auto walk_and_launch = [&](auto kernel, const char* name, const auto& shared_bytes,
                                   bool ahead) {
    const Description what = describe(name, a);
    arguments.walk =
        walk_over(windows.count * tiles, a.heads, kernel, shared_bytes, what, ahead ? 2 : 1);
    launch(kernel, arguments, dim3(arguments.walk.splits * a.heads), kThreads,
           shared_bytes(arguments.walk.stages), stream, what);
  };
  // The next item's own rows come during the last step of this one, which must not need its own.
  const bool ahead = tiles > 1;
  walk_and_launch(
      window_attention_backward_query_kernel<E, D>, "window_attention_backward_query",
      [&](int stages) { return query_shared<D>(windows, stages); }, ahead);
  walk_and_launch(
      window_attention_backward_key_kernel<E, D>, "window_attention_backward_key",
      [&](int stages) { return key_shared<D>(windows, stages); }, ahead && keeps_keys(D));
  if (!a.table.data) return;
  const int stages = table_shared<D>(windows, 2) <= shared_memory_limit() ? 2 : 1;
  arguments.walk = {windows.count, table_splits, stages};
  launch(window_attention_backward_table_kernel<E, D>, arguments,
         dim3(arguments.walk.splits * a.heads * tiles * tiles), kThreads,
         table_shared<D>(windows, stages), stream, describe("window_attention_backward_table", a));
}

}  // namespace

void large_backward(const BackwardArguments& arguments, int table_splits, void* stream) {
  with_element_and_head_dim(arguments.a, [&](auto element, auto head_dim) {
    launch_large<decltype(element), head_dim.value>(arguments, table_splits, stream);
  });
}

}  // namespace diffit::cuda
