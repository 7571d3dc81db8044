// The launchers of the backward on tensor cores: one kernel for windows of up to 64 tokens, three
// for larger ones, and the sums of their parts.
#include "cuda/dispatch.cuh"
#include "cuda/sums.cuh"
#include "cuda/window_attention_backward_large.cuh"
#include "cuda/window_attention_backward_small.cuh"
#include "cuda/window_attention_backward_table.cuh"

namespace diffit::cuda {
namespace {

// Blocks of threads of the kernels that sum over windows: a few for each multiprocessor, whatever
// their number, as sums are to be the same on all devices.
constexpr int kBlocks = 1024;

int splits(int64_t items, int64_t blocks_of_a_split) {
  const int64_t most = std::max<int64_t>(1, kBlocks / blocks_of_a_split);
  const int64_t each = (items + std::min(most, items) - 1) / std::min(most, items);
  return static_cast<int>((items + each - 1) / each);
}

constexpr bool has_small_kernel(int tokens, int head_dim) {
  return tokens <= 32 || (tokens <= 64 && head_dim <= 72);
}
bool is_small(const WindowAttention& a) { return has_small_kernel(a.tokens(), a.head_dim); }
int padded_tokens(const WindowAttention& a) {
  return a.tokens() <= 16 ? 16 : a.tokens() <= 32 ? 32 : 64;
}
int small_items(const WindowAttention& a) {
  const int windows = 64 / padded_tokens(a);
  return (a.windows() + windows - 1) / windows;
}
int table_splits(const WindowAttention& a) {
  if (is_small(a)) return splits(small_items(a), a.heads);
  const int tiles = window_tiles(Windows(a));
  return splits(a.windows(), int64_t{tiles} * tiles * a.heads);
}

struct Scratch {
  int64_t delta, dtemb, dtable;

  explicit Scratch(const WindowAttention& a) : delta(0), dtemb(0), dtable(0) {
    const Windows windows(a);
    const int64_t tiles = is_small(a) ? 1 : window_tiles(windows);
    if (!is_small(a)) delta = int64_t{windows.count} * a.heads * windows.tokens;
    if (a.temb.data) dtemb = windows.count * tiles * 2 * a.channels();
    if (a.table.data) {
      dtable = int64_t{table_splits(a)} * a.heads * tiles * tiles * pair_offsets(windows);
    }
  }
};

template <class E, int D, int KEYS>
void small_backward(BackwardArguments arguments, void* stream) {
  const WindowAttention& a = arguments.a;
  const auto kernel = window_attention_backward_small_kernel<E, D, KEYS>;
  const auto shared_bytes = [&](int stages) {
    return small_backward_shared<D, KEYS>(arguments.windows, stages);
  };
  arguments.walk = {small_items(a), splits(small_items(a), a.heads),
                    shared_bytes(2) <= shared_memory_limit() ? 2 : 1};
  launch(kernel, arguments, dim3(arguments.walk.splits * a.heads), kThreads,
         shared_bytes(arguments.walk.stages), stream,
         describe("window_attention_backward_small", a));
}

template <class E, int D>
void large_backward(BackwardArguments arguments, void* stream) {
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
  arguments.walk = {windows.count, table_splits(a), stages};
  launch(window_attention_backward_table_kernel<E, D>, arguments,
         dim3(arguments.walk.splits * a.heads * tiles * tiles), kThreads,
         table_shared<D>(windows, stages), stream, describe("window_attention_backward_table", a));
}

}  // namespace

int64_t backward_scratch(const WindowAttention& a, Family family) {
  if (family == Family::kHopper) return hopper_backward_scratch(a);
  const Scratch scratch(a);
  return scratch.delta + scratch.dtemb + scratch.dtable;
}

void window_attention_backward(const WindowAttention& a, Family family, void* stream) {
  if (family == Family::kHopper) return window_attention_backward_hopper(a, stream);
  const Scratch scratch(a);
  float* const dtemb = a.scratch + scratch.delta;
  BackwardArguments arguments{a, Windows(a), {}, a.scratch, dtemb, dtemb + scratch.dtemb};
  with_element_and_head_dim(a, [&](auto element, auto head_dim) {
    using E = decltype(element);
    constexpr int D = head_dim.value;
    if (a.tokens() <= 16) return small_backward<E, D, 16>(arguments, stream);
    if (a.tokens() <= 32) return small_backward<E, D, 32>(arguments, stream);
    if constexpr (has_small_kernel(64, D)) {
      if (a.tokens() <= 64) return small_backward<E, D, 64>(arguments, stream);
    }
    return large_backward<E, D>(arguments, stream);
  });
  if (a.temb.data) {
    const int columns = 2 * a.channels();
    const int parts = a.windows_of_sample() * (is_small(a) ? 1 : window_tiles(arguments.windows));
    launch(sum_parts_kernel, SumParts{dtemb, parts, columns, a.dtemb, a.temb.number},
           dim3((columns + 31) / 32 * a.batch), kSumThreads, 4 * kSumThreads, stream,
           describe("window_attention_backward_time", a));
  }
  if (a.table.data) {
    arguments.walk.splits = table_splits(a);
    launch(sum_table_kernel, arguments, dim3((a.table_size() + 31) / 32, a.heads), kSumThreads,
           4 * kSumThreads, stream, describe("window_attention_backward_sums", a));
  }
}

}  // namespace diffit::cuda
