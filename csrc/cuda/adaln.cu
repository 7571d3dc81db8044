// The launches of adaln's forward.
#include "cuda/adaln.cuh"
#include "cuda/adaln_launch.cuh"

namespace diffit::cuda {
namespace {

template <class X, int V, int K, int S>
void launch_forward(const AdaLN& a, int team, void* stream) {
  const int threads = Team::block_threads(team);
  launch(adaln_forward_kernel<X, V, K, S>, AdaLNForward{a, team},
         ceil_divide(a.samples * a.tokens, threads / team), threads,
         2 * Team::kRoom * int{sizeof(float)}, stream, describe("adaln_forward", a));
}

// A thread has 32 or 40 columns, so that a warp has 2 KB of 2-byte numbers on its way and few
// threads join in a sum; a row's first 128 bytes are read at once from 8 threads on. Rows of up to
// 1280 channels need one warp, whose sums are shuffles alone.
template <class X>
void forward(const AdaLN& a, void* stream) {
  constexpr int V = 16 / sizeof(X);
  const int c = a.channels;
  if (!in_vectors(a)) {
    if (c <= 4096) return launch_forward<X, 1, 8, 32>(a, round_up(ceil_divide(c, 8), 32), stream);
    return launch_forward<X, 1, 32, 32>(a, round_up(ceil_divide(c, 32), 32), stream);
  }
  if (c <= 64) return launch_forward<X, V, 8 / V, 1>(a, power_of_two(ceil_divide(c, 8)), stream);
  if (c <= 256) return launch_forward<X, V, 32 / V, 8>(a, 8, stream);
  if (c <= 512) return launch_forward<X, V, 32 / V, 16>(a, 16, stream);
  const int of_32 = round_up(ceil_divide(c, 32), 32), of_40 = round_up(ceil_divide(c, 40), 32);
  if (of_32 <= kForwardThreads && 32 * of_32 <= 40 * of_40) {
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
