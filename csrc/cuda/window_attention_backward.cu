// The launchers of the backward on tensor cores: one kernel for windows of up to 64 tokens, three
// for larger ones, and the sums of their parts.
#include "cuda/dispatch.cuh"
#include "cuda/sums.cuh"
#include "cuda/window_attention_backward.cuh"

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

bool is_small(const WindowAttention& a) { return has_small_kernel(a.tokens(), a.head_dim); }
int padded_tokens(const WindowAttention& a) {
  return a.tokens() <= 16 ? 16 : a.tokens() <= 32 ? 32 : 64;
}
int small_items(const WindowAttention& a) {
  const int windows = 64 / padded_tokens(a);
  return (a.windows() + windows - 1) / windows;
}
int splits_of(const WindowAttention& a) {
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
      dtable = int64_t{splits_of(a)} * a.heads * tiles * tiles * pair_offsets(windows);
    }
  }
};

// dtable from the parts of all pairs of tiles: blockIdx (rows of the table / 32, head).
__global__ void __launch_bounds__(kSumThreads)
    sum_table_kernel(const __grid_constant__ BackwardArguments arguments) {
  const Windows& windows = arguments.windows;
  const int heads = arguments.a.heads, head = blockIdx.y;
  const int row = blockIdx.x * 32 + threadIdx.x % 32;
  const int across = 2 * windows.width - 1, dy = row / across - (windows.height - 1);
  const int tiles = window_tiles(windows), pairs = tiles * tiles, offsets = pair_offsets(windows);
  const bool valid = row < windows.table_size();
  const float sum = sum_of_parts(valid ? arguments.walk.splits * pairs : 0, [&](int part) {
    const int split = part / pairs, pair = part % pairs;
    const int down = dy - first_difference(windows, pair / tiles, pair % tiles);
    const int offset = down * across + row % across;
    if (down < 0 || offset >= offsets) return 0.f;
    const int64_t at = (int64_t{split} * heads + head) * pairs + pair;
    return arguments.dtable_parts[at * offsets + offset];
  });
  if (valid && threadIdx.x < 32) {
    const Input& table = arguments.a.table;
    store_number(arguments.a.dtable, table.number, int64_t{row} * heads + head, sum);
  }
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
  const auto backward = is_small(a) ? small_backward : large_backward;
  backward(arguments, splits_of(a), stream);
  if (a.temb.data) {
    const int columns = 2 * a.channels();
    const int parts = a.windows_of_sample() * (is_small(a) ? 1 : window_tiles(arguments.windows));
    launch(sum_parts_kernel, SumParts{dtemb, parts, columns, a.dtemb, a.temb.number},
           dim3((columns + 31) / 32 * a.batch), kSumThreads, 4 * kSumThreads, stream,
           describe("window_attention_backward_time", a));
  }
  if (a.table.data) {
    arguments.walk.splits = splits_of(a);
    launch(sum_table_kernel, arguments, dim3((a.table_size() + 31) / 32, a.heads), kSumThreads,
           4 * kSumThreads, stream, describe("window_attention_backward_sums", a));
  }
}

}  // namespace diffit::cuda
