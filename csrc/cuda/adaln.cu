// The launches of adaln's forward.
#include "cuda/adaln.cuh"
#include "cuda/adaln_launch.cuh"

namespace diffit::cuda {
namespace {

template <class X, int V, int K, int S, int R = 1>
void launch_forward(const AdaLN& a, int threads_of_row, void* stream) {
  const TeamSize team = TeamSize::of(threads_of_row);
  const int threads = team.block_threads(), units = a.samples * ceil_divide(a.tokens, R);
  const int steps = ceil_divide(a.channels, V * threads_of_row);
  const int rooms = 2 * Team::kRoom * int{sizeof(float)};
  const int rows = K == 0 ? steps * threads * int{sizeof(Vector<X, V>)} : 0;
  launch(adaln_forward_kernel<X, V, K, S, R>, AdaLNForward{a, team, units, steps},
         ceil_divide(units, team.teams(threads)), threads, rooms + rows, stream,
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
    const int threads = round_up(ceil_divide(c, 8), 32);
    return launch_forward<X, 1, 0, 32>(a, std::min(threads, 256), stream);
  }
  if (c <= 64) return launch_forward<X, V, 8 / V, 1, R>(a, power_of_two(ceil_divide(c, 8)), stream);
  if (c <= 256) return launch_forward<X, V, 32 / V, 8, R>(a, 8, stream);
  if (c <= 512) return launch_forward<X, V, 32 / V, 16, R>(a, 16, stream);
  if (c <= 1024) return launch_forward<X, V, 32 / V, 32, R>(a, 32, stream);
  if (c <= 1280) return launch_forward<X, V, 40 / V, 32, R>(a, 32, stream);
  const int of_32 = round_up(ceil_divide(c, 32), 32), of_40 = round_up(ceil_divide(c, 40), 32);
  if (of_32 <= ForwardBlock<V, 1>::kThreads && 32 * of_32 <= 40 * of_40) {
    return launch_forward<X, V, 32 / V, 32>(a, of_32, stream);
  }
  launch_forward<X, V, 40 / V, 32>(a, of_40, stream);
}

}  // namespace

void adaln_forward(const AdaLN& given, void* stream) {
  const AdaLN a = normal(given);
  with_x(a, [&](auto x) { forward<decltype(x)>(a, stream); });
}

}  // namespace diffit::cuda
