// The launches of adaln's forward.
#include "cuda/adaln.cuh"
#include "cuda/adaln_launch.cuh"

namespace diffit::cuda {
namespace {

template <class X, int V, int K, int S, int kLeast, int R>
void launch_forward(const AdaLN& a, int threads_of_row, void* stream) {
  const TeamSize team = TeamSize::of(threads_of_row);
  const int threads = team.block_threads(), rows = R * team.teams(threads);
  const int steps = ceil_divide(a.channels, V * threads_of_row);
  int blocks = ceil_divide(a.samples * a.tokens, rows), floats = 2 * Team::kRoom;
  if (R > 1) blocks = ceil_divide(a.tokens, rows), floats = (a.gate.data ? 3 : 2) * a.channels;
  if (K == 0) floats += steps * threads;
  launch(adaln_forward_kernel<X, V, K, S, kLeast, R>, AdaLNForward{a, team, blocks, steps},
         R > 1 ? a.samples * blocks : blocks, threads, floats * int{sizeof(float)}, stream,
         describe("adaln_forward", a));
}

// A thread has up to 40 columns of a row, so that few threads join in a sum: rows of up to 1280
// channels need one warp, whose sums are shuffles alone. From 8 threads on a row's 128 bytes are
// read at once.
template <class X>
void forward(const AdaLN& a, void* stream) {
  constexpr int V = 16 / sizeof(X), R = sizeof(X) == 2 ? 2 : 1;
  const int c = a.channels;
  if (!in_vectors(a)) {
    const int threads = std::min(round_up(ceil_divide(c, 8), 32), 256);
    return launch_forward<X, 1, 0, 32, 0, 1>(a, threads, stream);
  }
  const int team = c > 512 ? 32 : c > 256 ? 16 : c > 64 ? 8 : power_of_two(ceil_divide(c, 8));
  // Two rows a team, with parameters shared by a block, if a sample has rows for half of it.
  const bool per_token = a.gate.token_stride || a.scale.token_stride || a.shift.token_stride;
  if (c <= 1280 && (R == 1 || (!per_token && a.tokens >= 128 / team))) {
    if (c <= 64) return launch_forward<X, V, 8 / V, 1, 0, R>(a, team, stream);
    if (c <= 256) return launch_forward<X, V, 32 / V, 8, 64, R>(a, team, stream);
    if (c <= 512) return launch_forward<X, V, 32 / V, 16, 256, R>(a, team, stream);
    if (c <= 1024) return launch_forward<X, V, 32 / V, 32, 512, R>(a, team, stream);
    return launch_forward<X, V, 40 / V, 32, 1024, R>(a, team, stream);
  }
  const int of_32 = round_up(ceil_divide(c, 32), 32), of_40 = round_up(ceil_divide(c, 40), 32);
  if (of_32 <= forward_threads(1) && 32 * of_32 <= 40 * of_40) {
    return launch_forward<X, V, 32 / V, 32, 0, 1>(a, of_32, stream);
  }
  launch_forward<X, V, 40 / V, 32, 0, 1>(a, of_40, stream);
}

}  // namespace

void adaln_forward(const AdaLN& given, void* stream) {
  const AdaLN a = normal(given);
  with_x(a, [&](auto x) { forward<decltype(x)>(a, stream); });
}

}  // namespace diffit::cuda
