// A head's channels of some tokens in shared memory, as TMA brings them and wgmma takes them.
//
// wgmma wants rows of 128 or 64 bytes, swizzled. head_dim D is one or more parts of so many
// channels, each of all tokens, one after the other, and for D = 72 a rest:
//
//     D    32        64         72                 96          128
//          1 x 32    1 x 64     1 x 64, rest 8     3 x 32      2 x 64
//
// The parts are alike, so that products whose columns are channels (PV) take all of them in one
// instruction. The rest has no swizzle: its rows are one chunk of 16 bytes, so that 8 tokens are a
// core matrix of wgmma as they lie. Products that sum over channels take 16 at a time; to the
// rest's 8 belong 8 zeros, which cannot be had from memory beside them: what lies there is another
// head's, and 0 x NaN is NaN. They come from a block of zeros in shared memory.
#pragma once

#include "cuda/kernels.h"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tensor_map.cuh"

namespace diffit::cuda {

// Descriptions of a tensor for boxes of a tile's parts and of its rest.
struct TileMaps {
  TensorMap parts, rest;
};

// A tile of `kTokens` (a multiple of 16) tokens of `D` channels; it is aligned to 1024 bytes.
template <int D, int kTokens>
struct HopperTile {
  static constexpr int kRest = D == 72 ? 8 : 0;
  static constexpr int kPartChannels = D == 32 || D == 96 ? 32 : 64;
  static constexpr int kRowBytes = 2 * kPartChannels;
  static constexpr int kParts = D / kPartChannels;
  static constexpr int kMain = kParts * kPartChannels;  // channels of all parts
  static constexpr int kPartBytes = kTokens * kRowBytes;
  static constexpr int kRestAt = kParts * kPartBytes;
  static constexpr int kBytes = 2 * kTokens * D;
  static constexpr int kSteps = (D + 15) / 16;  // products that sum over all channels
  static constexpr Swizzle kSwizzle = kRowBytes == 128 ? Swizzle::k128 : Swizzle::k64;
  static_assert(kMain + kRest == D && kTokens % 16 == 0);

  // For boxes of kTokens = box_width x box_height tokens, of a (B, H, W, channels) tensor.
  static TileMaps maps(const void* data, Number number, int channels, const WindowAttention& a,
                       int box_width, int box_height) {
    const auto map = [&](int box_channels, int swizzle) {
      return tensor_map(data, number, channels, a.width, a.height, a.batch, box_channels, box_width,
                        box_height, swizzle);
    };
    const TensorMap parts = map(kPartChannels, kRowBytes);
    return {parts, kRest ? map(kRest, 0) : parts};
  }

  static __device__ __forceinline__ void prefetch(const TileMaps& maps) {
    prefetch_map(maps.parts);
    if constexpr (kRest > 0) prefetch_map(maps.rest);
  }

  // One thread: copies the tokens of the box at (x, y) of sample b, channels from c on. kBytes will
  // count for the barrier.
  static __device__ __forceinline__ void load(unsigned char* tile, const TileMaps& maps,
                                              uint64_t* barrier, int c, int x, int y, int b) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      copy_box(tile + part * kPartBytes, maps.parts, barrier, c + part * kPartChannels, x, y, b);
    }
    if constexpr (kRest > 0) copy_box(tile + kRestAt, maps.rest, barrier, c + kMain, x, y, b);
  }

  // The reverse; to be followed by commit_stores().
  static __device__ __forceinline__ void store(const unsigned char* tile, const TileMaps& maps,
                                               int c, int x, int y, int b) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      store_box(maps.parts, tile + part * kPartBytes, c + part * kPartChannels, x, y, b);
    }
    if constexpr (kRest > 0) store_box(maps.rest, tile + kRestAt, c + kMain, x, y, b);
  }

  // Where channels 8 chunk to 8 chunk + 7 of a token lie, in bytes.
  static __device__ __forceinline__ int chunk(int token, int chunk) {
    if (kRest > 0 && chunk == kMain / 8) return kRestAt + 16 * token;
    const int part = chunk / (kPartChannels / 8), within = chunk % (kPartChannels / 8);
    const int swizzle = kRowBytes == 128 ? token % 8 : token / 2 % 4;
    return part * kPartBytes + token * kRowBytes + 16 * (within ^ swizzle);
  }

  // The tile as a K-major matrix from `token` (a multiple of 8) on: sums over channels.
  struct Channels {
    uint64_t parts, rest;

    // `zeros`: 16 bytes of zeros for each row of the product, at a higher address than the tile
    // and aligned to 16; only needed if there is a rest.
    __device__ __forceinline__ Channels(const unsigned char* tile, int token,
                                        const unsigned char* zeros)
        : parts(matrix(tile + token * kRowBytes, 0, 8 * kRowBytes, kSwizzle)),
          rest(kRest == 0
                   ? 0
                   : matrix(tile + kRestAt + 16 * token, int(zeros - (tile + kRestAt + 16 * token)),
                            128, Swizzle::kNone)) {}

    // Channels 16 step to 16 step + 15.
    __device__ __forceinline__ uint64_t operator[](int step) const {
      if (kRest > 0 && step == kSteps - 1) return rest;
      constexpr int kStepsOfPart = kPartChannels / 16;
      return moved(parts, step / kStepsOfPart * kPartBytes + step % kStepsOfPart * 32);
    }
  };

  // The tile as N-major matrices from `token` (a multiple of 16) on: sums over tokens. `parts` has
  // kMain columns, `rest` kRest.
  struct Tokens {
    uint64_t parts_, rest_;

    __device__ __forceinline__ Tokens(const unsigned char* tile, int token)
        : parts_(matrix(tile + token * kRowBytes, kPartBytes, 8 * kRowBytes, kSwizzle)),
          rest_(kRest == 0 ? 0 : matrix(tile + kRestAt + 16 * token, 128, 128, Swizzle::kNone)) {}

    // Tokens 16 step to 16 step + 15.
    __device__ __forceinline__ uint64_t parts(int step) const {
      return moved(parts_, step * 16 * kRowBytes);
    }
    __device__ __forceinline__ uint64_t rest(int step) const { return moved(rest_, step * 256); }
  };
};

// A warpgroup's sums (64, D) in float32, as wgmma's D: thread 32 w + 4 g + t has of channels
// 8 n + 2t and 8 n + 2t + 1 what row 16 w + g holds, in at(n, 0) and at(n, 1), and row 16 w + g +
// 8, in at(n, 2) and at(n, 3).
template <int D>
struct HeadSums {
  using Tile = HopperTile<D, 64>;
  float parts[Tile::kMain / 2];
  float rest[4];  // of no register unless Tile::kRest > 0

  // n is a compile-time constant.
  __device__ __forceinline__ float& at(int n, int i) {
    return n < Tile::kMain / 8 ? parts[4 * n + i] : rest[i];
  }

  __device__ __forceinline__ void hold_all() {
    hold(parts);
    if constexpr (Tile::kRest > 0) hold(rest);
  }

  // += A B, or = A B: A (64, 16) in registers, B tokens 16 step to 16 step + 15 of a tile.
  template <class E, class Tokens>
  __device__ __forceinline__ void multiply(const uint32_t (&a)[4], const Tokens& b, int step,
                                           bool add) {
    Wgmma<E, Tile::kMain, 1>::run(parts, a, b.parts(step), add);
    if constexpr (Tile::kRest > 0) Wgmma<E, Tile::kRest, 1>::run(rest, a, b.rest(step), add);
  }

  // A warp's 16 rows, rounded, to a tile's tokens from `token` (a multiple of 16) on.
  template <class E, int kTokens>
  __device__ __forceinline__ void store(unsigned char* tile, int token, int lane) {
    using To = HopperTile<D, kTokens>;
    const int row = token + lane % 16;
#pragma unroll
    for (int n = 0; n + 1 < D / 8; n += 2) {
      const uint32_t r[] = {pack<E>(at(n, 0), at(n, 1)), pack<E>(at(n, 2), at(n, 3)),
                            pack<E>(at(n + 1, 0), at(n + 1, 1)),
                            pack<E>(at(n + 1, 2), at(n + 1, 3))};
      store_matrices(tile + To::chunk(row, n + lane / 16), r);
    }
    if constexpr (D / 8 % 2 == 1) {
      constexpr int n = D / 8 - 1;
      const uint32_t r[] = {pack<E>(at(n, 0), at(n, 1)), pack<E>(at(n, 2), at(n, 3))};
      store_matrices(tile + To::chunk(row, n), r);
    }
  }
};

}  // namespace diffit::cuda
