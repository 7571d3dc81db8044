// The launchers of the backward for Hopper.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/dispatch.cuh"
#include "cuda/sums.cuh"
#include "cuda/window_attention_hopper_backward_key_compute.cuh"
#include "cuda/window_attention_hopper_backward_query_compute.cuh"
#include "cuda/window_attention_hopper_backward_table.cuh"

namespace diffit::cuda {
namespace {

// What sums are shared out among, whatever the device has, so that they are the same on all.
constexpr int kMultiprocessors = 132;

// As many stages, up to 8, as there is room for.
template <class SharedBytes>
int most_stages(const SharedBytes& shared_bytes) {
  int stages = kHopperMaxTiles;
  while (stages > 0 && shared_bytes(stages) > kHopperSharedMemory) --stages;
  return stages;
}

// Into how many parts the windows are divided for so many blocks of threads of each part.
int splits_of(int windows, int blocks) {
  const int most = std::clamp(kMultiprocessors / blocks, 1, windows);
  const int each = (windows + most - 1) / most;
  return (windows + each - 1) / each;
}

// How the kernels share out the work: by sizes alone, but for the kernel that sums nothing up.
struct Plan {
  int blocks;  // of 128 tokens, in a window
  // `folded`: the query kernel makes dtable. Otherwise pairs of blocks of `key_tiles` tiles do.
  bool folded;
  int key_tiles, query_splits, table_splits;
  int query_stages, key_stages, table_stages;

  // Room for what is worked on and for what comes next: hopper_serves() has made sure of it.
  bool fits(const WindowAttention& a) const {
    return query_stages >= 2 && key_stages >= 2 &&
           (folded || a.table.data == nullptr || table_stages >= 2);
  }
  int pairs() const { return folded ? blocks : blocks * (2 * blocks / key_tiles); }
  int pair_offsets(const WindowAttention& a) const {
    return pair_rows(a.window_width, key_tiles) * (2 * a.window_width - 1);
  }
  int splits() const { return folded ? query_splits : table_splits; }
  int64_t dtemb_floats(const WindowAttention& a) const {
    return a.temb.data ? int64_t{a.windows()} * 2 * blocks * 2 * a.channels() : 0;
  }
  int64_t dtable_floats(const WindowAttention& a) const {
    return a.table.data ? int64_t{splits()} * a.heads * pairs() * pair_offsets(a) : 0;
  }
  int64_t delta_floats(const WindowAttention& a) const {
    return int64_t{a.windows()} * a.heads * a.tokens();
  }
};

template <int D, int W>
Plan plan_of(const WindowAttention& a) {
  const int bias_bytes = HopperBiases<W>::bytes(a.window_height);
  const auto query_stages = [&](int tiles) {
    return most_stages([&](int stages) {
      return HopperQueryShared<D>::bytes(stages, bias_bytes, pair_sum_bytes(tiles));
    });
  };
  Plan plan;
  plan.blocks = a.tokens() / (2 * kHopperRows);
  const int tiles = 2 * plan.blocks;
  plan.folded = a.table.data && tiles <= 4 && query_stages(tiles) >= 2;
  plan.query_stages = query_stages(plan.folded ? tiles : 0);
  plan.key_stages =
      most_stages([&](int stages) { return HopperKeyShared<D>::bytes(stages, bias_bytes); });
  plan.key_tiles = plan.folded ? tiles : tiles % 4 == 0 ? 4 : 2;
  const auto table_stages = [&] {
    return most_stages([&](int stages) {
      return HopperTableShared<D>::bytes(stages, bias_bytes, pair_sum_bytes(plan.key_tiles));
    });
  };
  plan.table_stages = table_stages();
  if (!plan.folded && plan.table_stages < 2) {
    plan.key_tiles = 2;
    plan.table_stages = table_stages();
  }
  plan.query_splits = splits_of(a.windows(), a.heads * plan.blocks);
  plan.table_splits = splits_of(a.windows(), a.heads * plan.pairs());
  return plan;
}

Plan plan_of(const WindowAttention& a) {
  Plan plan;
  with_element_and_head_dim(a, [&](auto, auto head_dim) {
    with_width(a.window_width, [&](auto width) { plan = plan_of<head_dim.value, width.value>(a); });
  });
  return plan;
}

struct TableSums {
  WindowAttention a;
  const float* parts;
  int splits, blocks, pairs, key_tiles;
};

// dtable from the parts of all pairs of blocks: blockIdx (rows of the table / 32, head).
__global__ void __launch_bounds__(kSumThreads)
    window_attention_backward_hopper_sums_kernel(const __grid_constant__ TableSums arguments) {
  const WindowAttention& a = arguments.a;
  const int heads = a.heads, head = blockIdx.y, w = a.window_width, pairs = arguments.pairs;
  const int row = blockIdx.x * 32 + threadIdx.x % 32;
  const int across = 2 * w - 1, dy = row / across - (a.window_height - 1);
  const int key_blocks = pairs / arguments.blocks, key_rows = 64 / w * arguments.key_tiles;
  const int offsets = pair_rows(w, arguments.key_tiles) * across;
  const bool valid = row < a.table_size();
  const float sum = sum_of_parts(valid ? arguments.splits * pairs : 0, [&](int part) {
    const int split = part / pairs, pair = part % pairs;
    const int apart = pair / key_blocks * (128 / w) - pair % key_blocks * key_rows;
    const int offset = (dy - apart + key_rows - 1) * across + row % across;
    if (offset < 0 || offset >= offsets) return 0.f;
    return arguments.parts[((int64_t{split} * heads + head) * pairs + pair) * offsets + offset];
  });
  if (valid && threadIdx.x < 32) {
    store_number(a.dtable, a.table.number, int64_t{row} * heads + head, sum);
  }
}

template <class E, int D, int W>
void backward(const WindowAttention& a, void* stream) {
  using Tile = HopperTile<D, kHopperRows>;
  const Plan plan = plan_of<D, W>(a);
  if (!plan.fits(a)) {
    throw std::runtime_error(std::string(describe("window_attention_backward for Hopper", a)) +
                             ": no room in shared memory");
  }
  const int bias_bytes = HopperBiases<W>::bytes(a.window_height), channels = a.channels();
  const auto maps = [&](const void* data, int of) {
    return Tile::maps(data, a.number, of, a, W, kHopperRows / W);
  };
  constexpr int N = kHopperColumns<D>;
  const auto maps_of_step = [&](const void* data, int of, const TileMaps& maps) {
    if constexpr (N == kHopperRows) return maps;
    return HopperTile<D, N>::maps(data, a.number, of, a, W, N / W);
  };
  const TileMaps qkv = maps(a.qkv, 3 * channels), grad_out = maps(a.grad_out, channels);
  constexpr int kWidth = W < 16 ? W : 16;
  float* const dtemb = a.scratch + plan.delta_floats(a);
  HopperBackwardArguments arguments{
      a,
      {0, plan.blocks, 1, 0, 0, a.windows_of_sample(), a.width / W},
      plan.query_splits,
      plan.key_tiles,
      qkv,
      maps(a.out, channels),
      grad_out,
      maps_of_step(a.qkv, 3 * channels, qkv),
      maps_of_step(a.grad_out, channels, grad_out),
      Tile::maps(a.dqkv, a.number, 3 * channels, a, kWidth, 16 / kWidth),
      a.scratch,
      dtemb,
      dtemb + plan.dtemb_floats(a)};
  const auto run = [&](auto kernel, const char* name, dim3 blocks, int stages, int bytes) {
    arguments.walk.stages = stages;
    launch(kernel, arguments, blocks, kHopperThreads, bytes, stream, describe(name, a));
  };

  const auto run_query = [&](auto kernel) {
    run(kernel, "window_attention_backward_query for Hopper",
        dim3(a.heads, plan.blocks, plan.query_splits), plan.query_stages,
        HopperQueryShared<D>::bytes(plan.query_stages, bias_bytes,
                                    plan.folded ? pair_sum_bytes(plan.key_tiles) : 0));
  };
  if (plan.folded) {
    run_query(window_attention_backward_hopper_query_kernel<E, D, W, true>);
  } else {
    run_query(window_attention_backward_hopper_query_kernel<E, D, W, false>);
  }

  // Queries stay for all keys of a window if there is room, and if that does not leave
  // multiprocessors without work.
  const int room = std::max(1, multiprocessors() / a.heads);
  const auto steps = [&](int items, int each) { return (items + room - 1) / room * each; };
  const bool stay = a.tokens() / N <= plan.key_stages &&
                    steps(a.windows(), plan.blocks) <= steps(a.windows() * plan.blocks, 1);
  HopperWalk& walk = arguments.walk;
  walk.reuse = stay ? plan.blocks : 1;
  walk.items = a.windows() * plan.blocks / walk.reuse;
  const int each = (walk.items + room - 1) / room;
  walk.workers = (walk.items + each - 1) / each;
  run(window_attention_backward_hopper_key_kernel<E, D, W>,
      "window_attention_backward_key for Hopper", dim3(a.heads, walk.workers), plan.key_stages,
      HopperKeyShared<D>::bytes(plan.key_stages, bias_bytes));

  if (a.table.data && !plan.folded) {
    arguments.splits = plan.table_splits;
    run(window_attention_backward_hopper_table_kernel<E, D, W>,
        "window_attention_backward_table for Hopper",
        dim3(a.heads, plan.pairs(), plan.table_splits), plan.table_stages,
        HopperTableShared<D>::bytes(plan.table_stages, bias_bytes, pair_sum_bytes(plan.key_tiles)));
  }
  if (a.temb.data) {
    const int columns = 2 * channels, parts = a.windows_of_sample() * 2 * plan.blocks;
    launch(sum_parts_kernel, SumParts{arguments.dtemb, parts, columns, a.dtemb, a.temb.number},
           dim3((columns + 31) / 32 * a.batch), kSumThreads, 4 * kSumThreads, stream,
           describe("window_attention_backward_time", a));
  }
  if (a.table.data) {
    launch(window_attention_backward_hopper_sums_kernel,
           TableSums{a, arguments.dtable, plan.splits(), plan.blocks, plan.pairs(), plan.key_tiles},
           dim3((a.table_size() + 31) / 32, a.heads), kSumThreads, 4 * kSumThreads, stream,
           describe("window_attention_backward_sums for Hopper", a));
  }
}

}  // namespace

int64_t hopper_backward_scratch(const WindowAttention& a) {
  const Plan plan = plan_of(a);
  return plan.delta_floats(a) + plan.dtemb_floats(a) + plan.dtable_floats(a);
}

void window_attention_backward_hopper(const WindowAttention& a, void* stream) {
  with_element_and_head_dim(a, [&](auto element, auto head_dim) {
    with_width(a.window_width, [&](auto width) {
      backward<decltype(element), head_dim.value, width.value>(a, stream);
    });
  });
}

}  // namespace diffit::cuda
