// A small product of matrices, as kernels for Hopper do them: a producer's copies into a ring of
// tiles, and a warpgroup's products of them. With faults to plant in it.
#pragma once

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tensor_map.cuh"
#include "product.cuh"

namespace diffit::cuda {

enum class RingFault {
  kNone,
  kNoWait,              // for the copies
  kNoProductsWait,      // for the products, before D is stored
  kEarlyRelease,        // of a tile whose products have not been waited for
  kConsumerParity,      // is not turned from round to round
  kProducerParity,      // likewise
  kNoExpect,            // of bytes
  kFewBytes,            // are expected
  kManyBytes,           // are expected
  kManyArrivals,        // at a tile's release
  kNoBarrierFence,      // after barrier_init
  kBarrierOverwritten,  // by an ordinary store
  kWrongLeading,        // offset of B
  kLargeOffset,         // of B, in its descriptor
  kUnalignedTile,       // to what the swizzle demands
  kUnalignedMatrix,     // likewise
  kOutOfBounds,         // where B lies
  kNoFence,             // before the products
  kPartOfWarpgroup,     // asks for another product
  kWrittenD,            // while a product is under way
  kWrittenA,            // likewise
  kNoProxyFence,        // after ordinary stores to a tile
};

struct Ring {
  TensorMap a, b;
  const uint16_t* a_data;  // (64, 64 tiles)
  float* d;                // (64, n)
  int tiles;
  RingFault fault;
};

constexpr int kRingStages = 2, kRingThreads = 160;

// Bytes of a matrix of `lines` lines of `length` numbers, as boxes of one row of the swizzle each.
constexpr int matrix_bytes(int lines, int length, int row) {
  return (2 * length + row - 1) / row * lines * row;
}

// D (64, N) = A (64, 64 tiles) B (64 tiles, N). B is in memory as (N, 64 tiles), or, if N-major, as
// (64 tiles, N). A is in shared memory as B is, or in registers.
template <class E, int N, bool kMajorB, int kRowBytes, bool kRegisters>
struct RingOf {
  static constexpr int kRow = kRowBytes == 0 ? 16 : kRowBytes, kChannels = kRow / 2;
  static constexpr Swizzle kSwizzle = kRowBytes == 128  ? Swizzle::k128
                                      : kRowBytes == 64 ? Swizzle::k64
                                                        : Swizzle::kNone;
  static constexpr int kLinesB = kMajorB ? 64 : N, kLengthB = kMajorB ? N : 64;
  static constexpr int kBytesA = matrix_bytes(64, 64, kRow);
  static constexpr int kBytesB = matrix_bytes(kLinesB, kLengthB, kRow);
  static constexpr int kRoomB = (kBytesB + 1023) / 1024 * 1024;
  static constexpr int kStage = kBytesA + kRoomB;
  static constexpr int kShared = kRingStages * kStage + 64;

  // The K-major matrix of 16 k's, of a tile of boxes of `lines` lines.
  static uint64_t k_major(const unsigned char* tile, int lines, int step) {
    const int box = lines * kRow, boxes = 16 / kChannels;
    if (kRowBytes == 0) return matrix(tile + step * boxes * box, box, 128, kSwizzle);
    const int part = step * 16 / kChannels, within = step * 16 % kChannels * 2;
    return moved(matrix(tile + part * box, 0, 8 * kRow, kSwizzle), within);
  }

  static uint64_t matrix_b(const unsigned char* tile, int step, RingFault fault) {
    if (fault == RingFault::kLargeOffset) return matrix(tile, 1 << 18, 128, kSwizzle);
    if (fault == RingFault::kUnalignedMatrix) tile += kRow;
    if (!kMajorB) return k_major(tile, N, step);
    int to_columns = 64 * kRow, to_rows = 8 * kRow;
    if (fault == RingFault::kWrongLeading) to_columns = to_rows;
    if (fault == RingFault::kOutOfBounds) to_columns = 1 << 17;
    const uint64_t b = kRowBytes == 0 ? matrix(tile, to_rows, to_columns, kSwizzle)
                                      : matrix(tile, to_columns, to_rows, kSwizzle);
    return moved(b, step * 16 * kRow);
  }

  static void produce(const Ring& ring, unsigned char* memory, uint64_t* full, uint64_t* empty) {
    for (int i = 0; i < ring.tiles; ++i) {
      const int stage = i % kRingStages;
      const int turn = ring.fault == RingFault::kProducerParity ? 0 : i / kRingStages;
      barrier_wait(&empty[stage], turn % 2 ^ 1);
      int bytes = kBytesA + kBytesB;
      if (ring.fault == RingFault::kFewBytes) bytes -= 1024;
      if (ring.fault == RingFault::kManyBytes) bytes += 1024;
      if (ring.fault == RingFault::kNoExpect) bytes = 0;
      barrier_arrive_expecting(&full[stage], bytes);
      unsigned char* a = memory + stage * kStage;
      unsigned char* b = a + kBytesA;
      if (ring.fault == RingFault::kUnalignedTile) a += 64;
      for (int c = 0; c < 64; c += kChannels, a += 64 * kRow) {
        copy_box(a, ring.a, &full[stage], 64 * i + c, 0, 0, 0);
      }
      for (int c = 0; c < kLengthB; c += kChannels, b += kLinesB * kRow) {
        copy_box(b, ring.b, &full[stage], (kMajorB ? 0 : 64 * i) + c, kMajorB ? 64 * i : 0, 0, 0);
      }
    }
  }

  static void consume(const Ring& ring, unsigned char* memory, uint64_t* full, uint64_t* empty) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const RingFault fault = ring.fault;
    float d[N / 2];
    uint32_t registers[4][4];
    for (int i = 0; i < ring.tiles; ++i) {
      const int stage = i % kRingStages;
      const int turn = fault == RingFault::kConsumerParity ? 0 : i / kRingStages;
      if (fault != RingFault::kNoWait) barrier_wait(&full[stage], turn % 2);
      const unsigned char* a = memory + stage * kStage;
      for (int step = 0; step < 4; ++step) {
        for (int part = 0; part < 4; ++part) {
          const int row = 16 * warp + g + part % 2 * 8, k = 64 * i + 16 * step + part / 2 * 8;
          const uint16_t* from = ring.a_data + row * 64 * ring.tiles + k + 2 * t;
          registers[step][part] = from[0] | uint32_t(from[1]) << 16;
        }
      }
      if (fault != RingFault::kNoFence) wgmma_fence();
      for (int step = 0; step < 4; ++step) {
        const bool add =
            i > 0 || step > (fault == RingFault::kPartOfWarpgroup && warp == 2 ? 1 : 0);
        const uint64_t b = matrix_b(a + kBytesA, step, fault);
        using Product = Wgmma<E, N, kMajorB>;
        if constexpr (kRegisters) {
          Product::run(d, registers[step], b, add);
        } else {
          Product::run(d, k_major(a, 64, step), b, add);
        }
      }
      wgmma_commit();
      if (fault == RingFault::kWrittenD) d[3] = 1;
      if (fault == RingFault::kWrittenA) registers[2][1] = 0;
      if (fault == RingFault::kEarlyRelease) barrier_arrive(&empty[stage]);
      if (fault != RingFault::kNoProductsWait) wgmma_wait<0>();
      if (fault != RingFault::kEarlyRelease) barrier_arrive(&empty[stage]);
      if (fault == RingFault::kManyArrivals && warp == 0) barrier_arrive(&empty[stage]);
    }
    for (int i = 0; i < N / 2; ++i) {
      const int row = 16 * warp + g + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * t + i % 2;
      ring.d[row * N + column] = d[i];
    }
  }

  // Four warps that multiply, and one whose first thread copies.
  static void kernel(Ring ring) {
    unsigned char* memory = shared_memory();
    auto* full = reinterpret_cast<uint64_t*>(memory + kRingStages * kStage);
    uint64_t* empty = full + kRingStages;
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kRingStages; ++stage) {
        barrier_init(&full[stage], 1);
        barrier_init(&empty[stage], 128);
      }
      if (ring.fault != RingFault::kNoBarrierFence) fence_barriers();
    }
    __syncthreads();
    if (ring.fault == RingFault::kBarrierOverwritten && threadIdx.x == 1) full[1] = 0;
    if (threadIdx.x < 128) {
      consume(ring, memory, full, empty);
    } else if (threadIdx.x == 128) {
      produce(ring, memory, full, empty);
    }
  }

  static void check(int tiles, RingFault fault) {
    const auto a = integers<E>(64 * 64 * tiles), b = integers<E>(64 * tiles * N);
    std::vector<uint16_t> transposed(b.size());
    for (int k = 0; k < 64 * tiles; ++k) {
      for (int n = 0; n < N; ++n) transposed[n * 64 * tiles + k] = b[k * N + n];
    }
    std::vector<float> d(64 * N);
    const Number number = std::is_same_v<E, BFloat16> ? Number::kBFloat16 : Number::kFloat16;
    const auto map = [&](const std::vector<uint16_t>& data, int channels, int lines,
                         int box_lines) {
      return tensor_map(data.data(), number, channels, lines, 1, 1, kChannels, box_lines, 1,
                        kRowBytes);
    };
    Ring ring{map(a, 64 * tiles, 64, 64),
              kMajorB ? map(b, N, 64 * tiles, 64) : map(transposed, 64 * tiles, N, N),
              a.data(),
              d.data(),
              tiles,
              fault};
    launch(kernel, ring, 1, kRingThreads, kShared, nullptr, "ring");
    compare<E>(d, a, b, N, 64 * tiles);
  }
};

}  // namespace diffit::cuda
