// The launches of adaln's backward.
#include <algorithm>
#include <cstdint>

#include "cuda/adaln_backward.cuh"
#include "cuda/adaln_launch.cuh"
#include "cuda/adaln_sums.cuh"

namespace diffit::cuda {
namespace {

// How the backward goes about it: by sizes, alignments and what is wanted alone.
struct Plan {
  bool vectors, general;  // which kernel
  int columns;            // of a thread
  int tiles;              // teams for a row, one after the other; the row's means are taken before
  AdaLNSums a;            // with pointers into scratch, if there is any
  int64_t floats;         // of scratch
};

// As many chunks as keep all of today's GPUs busy at once (512 blocks), but of 8 rows of each team
// at least, or there would be as many rows of sums as rows; and of 64 at most, so that no sum in
// order has more terms.
int chunks(const AdaLN& a, int teams, int tiles) {
  const int64_t rounds = int64_t(a.samples) * a.tokens * tiles / (512 * teams);
  return ceil_divide(a.tokens, std::clamp<int>(rounds, 8, 64) * teams);
}

Plan plan(const AdaLN& given) {
  const AdaLN a = normal(given);
  Plan p{};
  p.a = AdaLNSums{{a}};
  p.vectors = in_vectors(a);
  p.columns = p.vectors ? 8 : 4;
  const int most = p.columns * kBackwardThreads, tile = p.columns * 256;
  p.tiles = a.channels > most ? ceil_divide(a.channels, tile) : 1;
  const int threads = ceil_divide(p.tiles > 1 ? tile : a.channels, p.columns);
  // Only 16-byte vectors of 2-byte numbers leave a thread one stretch of columns, so that a team
  // may be less than a warp.
  const bool narrow = p.vectors && bytes(a.number) == 2 && threads <= 32;
  p.a.team = TeamSize::of(narrow ? power_of_two(threads) : round_up(threads, 32));
  p.general = p.tiles > 1 || p.a.team.threads > kLeanThreads || a.gate.token_stride ||
              a.shift.token_stride || a.scale.token_stride;
  p.a.chunks = chunks(a, p.a.team.teams(p.a.team.block_threads()), p.tiles);

  const int64_t row = a.channels;
  const bool affine = a.dweight || a.dbias, shift = a.shift.grad && per_sample(a.shift);
  const bool shift_apart = shift && a.scale.token_stride;
  const bool common = affine || per_sample(a.scale) || (shift && !shift_apart);
  const bool second = affine && a.samples > 1;
  const auto take = [&](int64_t floats, bool wanted) -> float* {
    if (!wanted) return nullptr;
    const int64_t before = p.floats;
    p.floats += (floats + 3) / 4 * 4;  // so that what comes next is aligned
    return a.scratch ? a.scratch + before : nullptr;
  };
  const int64_t rows = int64_t(a.samples) * a.tokens, sums = a.samples * p.a.chunks * row;
  p.a.row_means = take(2 * rows, p.tiles > 1);
  p.a.sum = take(sums, common);
  p.a.sum_normed = take(sums, common);
  p.a.sum_branch = take(sums, per_sample(a.gate));
  p.a.sum_dout = take(sums, shift_apart);
  p.a.sample_sum = take(a.samples * row, second);
  p.a.sample_sum_normed = take(a.samples * row, second);
  return p;
}

// As many rows ahead as there is shared memory for with four blocks of 160 threads on a
// multiprocessor, 1152 channels: with 2 bytes each, 3 rows of 2 to 4 tensors in 4 blocks are 55 to
// 110 KB on their way.
template <class X, int V, int K>
int shared_bytes(Plan& p, int threads) {
  const int step = p.a.team.teams(threads);
  const int statistics = 8 * round_up(ceil_divide(p.a.tokens, p.a.chunks), step);
  const int stage = Ahead<X, V, K, 1>::stage_bytes(p.a);
  p.a.ahead_offset = kRooms + round_up(statistics, 16);
  p.a.stages = 1;
  if (stage > 0) {
    const int bytes = shared_memory_limit() / 4 - 2048;
    p.a.stages = std::clamp(bytes / 160 / stage, 1, 4);
  }
  const int sum_room = step > 1 ? kRooms + threads * K * V * int{sizeof(float)} : 0;
  return std::max(p.a.ahead_offset + p.a.stages * stage * threads, sum_room);
}

template <class X, int V, int K>
void backward_rows(Plan& p, void* stream) {
  const int threads = p.a.team.block_threads(), shared = shared_bytes<X, V, K>(p, threads);
  const AdaLNBackward& a = p.a;
  if (p.tiles > 1) {
    launch(adaln_means_kernel<X, V>, a, a.samples * a.tokens, kMeansThreads,
           Team::kRoom * int{sizeof(float)}, stream, describe("adaln_means", a));
  }
  const auto kernel =
      p.general ? adaln_backward_kernel<X, V, K, true> : adaln_backward_kernel<X, V, K, false>;
  launch(kernel, a, dim3(a.samples * a.chunks, p.tiles), threads, shared, stream,
         describe("adaln_backward", a));
}

// Up to 8 chunks a thread, whose loads go on at once.
void sum_up(AdaLNSums a, void* stream) {
  a.columns = kSumThreads / std::min(64, power_of_two(ceil_divide(a.chunks, 8)));
  launch(adaln_sums_kernel, a, a.samples * ceil_divide(a.channels, a.columns), kSumThreads,
         kSumRoom, stream, describe("adaln_sums", a));
}

}  // namespace

int64_t backward_scratch(const AdaLN& a) { return plan(a).floats; }

void adaln_backward(const AdaLN& given, void* stream) {
  Plan p = plan(given);
  with_x(p.a, [&](auto x) {
    using X = decltype(x);
    constexpr int V = 16 / sizeof(X);
    p.vectors ? backward_rows<X, V, 8 / V>(p, stream) : backward_rows<X, 1, 4>(p, stream);
  });
  if (!p.a.sum && !p.a.sum_branch && !p.a.sum_dout) return;
  sum_up(p.a, stream);
  if (!p.a.sample_sum) return;
  AdaLNSums a = p.a;
  a.chunks = a.samples, a.samples = 1;
  a.sum = a.sample_sum, a.sum_normed = a.sample_sum_normed;
  a.sum_branch = a.sum_dout = a.sample_sum = a.sample_sum_normed = nullptr;
  a.gate = a.shift = a.scale = {};
  sum_up(a, stream);
}

}  // namespace diffit::cuda
