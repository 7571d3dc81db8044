// What a warp does together: shuffles, votes, products of fragments and ldmatrix.
#include <algorithm>
#include <bit>

#include "cuda/ptx/mma.cuh"
#include "emulation.h"

namespace diffit::emulation {

void check_mask(unsigned mask, const char* name, Location where) {
  if (mask != 0xffffffffu) fail(std::string(name) + " of a part of the warp", where);
}

void sync_warp(Location where) {
  int payload = 0;
  warp_collective("__syncwarp", payload, [](Payloads<int>) {}, where);
}

unsigned ballot(const char* name, bool vote, Location where) {
  struct {
    bool vote;
    unsigned all;
  } payload{vote, 0};
  warp_collective(
      name, payload,
      [](const auto& lanes) {
        unsigned all = 0;
        for (int i = 0; i < 32; ++i) all |= unsigned(lanes[i].vote) << i;
        for (int i = 0; i < 32; ++i) lanes[i].all = all;
      },
      where);
  return payload.all;
}

uint64_t shuffle(Shuffle kind, const char* name, uint64_t value, int argument, int width,
                 Location where) {
  if (width < 1 || width > 32 || !std::has_single_bit(unsigned(width))) {
    fail(std::string(name) + ": width " + std::to_string(width) + " is not a power of 2", where);
  }
  const int lane = lane_index(), begin = lane & -width, last = begin + width - 1;
  const int by = argument & 31;
  int source = lane;  // a lane that would read another segment keeps its own value
  switch (kind) {
    case Shuffle::kIndex:
      source = begin + (by & (width - 1));
      break;
    case Shuffle::kUp:
      if (lane - by >= begin) source = lane - by;
      break;
    case Shuffle::kDown:
      if (lane + by <= last) source = lane + by;
      break;
    case Shuffle::kXor:
      if ((lane ^ by) <= last) source = lane ^ by;
      break;
  }
  struct {
    uint64_t value, result;
    int source;
  } payload{value, 0, source};
  warp_collective(
      name, payload,
      [](const auto& lanes) {
        for (int i = 0; i < 32; ++i) lanes[i].result = lanes[lanes[i].source].value;
      },
      where);
  return payload.result;
}

namespace {

// Where the i-th number of a lane's fragment stands, by the tables of the PTX ISA for mma.m16n8k16;
// mma.m16n8k8 has the first half of A's and B's.
struct Place {
  int row, column;
};
Place place_of_a(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  return {i < 2 || (i >= 4 && i < 6) ? group : group + 8,
          in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0)};
}
Place place_of_b(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  return {in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0), group};
}
Place place_of_d(int lane, int i) {
  const int group = lane >> 2, in_group = lane % 4;
  return {i < 2 ? group : group + 8, in_group * 2 + (i & 1)};
}

// D (16, 8) += A (16, K) B (K, 8).
template <class E, int K>
void multiply(const Payloads<cuda::Fragments>& lanes) {
  float a[16][K], b[K][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const cuda::Fragments& own = lanes[lane];
    for (int i = 0; i < K / 2; ++i) {
      const Place at = place_of_a(lane, i);
      a[at.row][at.column] = cuda::to_float(E{uint16_t(own.a[i / 2] >> i % 2 * 16)});
    }
    for (int i = 0; i < K / 4; ++i) {
      const Place at = place_of_b(lane, i);
      b[at.row][at.column] = cuda::to_float(E{uint16_t(own.b[i / 2] >> i % 2 * 16)});
    }
    for (int i = 0; i < 4; ++i) {
      const Place at = place_of_d(lane, i);
      d[at.row][at.column] = own.d[i];
    }
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < K; ++k) {
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const Place at = place_of_d(lane, i);
      lanes[lane].d[i] = d[at.row][at.column];
    }
  }
}

// In how many turns shared memory serves the rows of a matrix: a turn is 128 bytes, 4 of each bank.
// Rows that are the same one are read at once.
int bank_ways(const uint32_t (&rows)[8]) {
  int ways = 1, count[8] = {};  // different rows in the same 16 bytes of 128
  for (int i = 0; i < 8; ++i) {
    if (std::find(rows, rows + i, rows[i]) != rows + i) continue;
    ways = std::max(ways, ++count[rows[i] / 16 % 8]);
  }
  return ways;
}

}  // namespace

template <class E>
void multiply_fragments(cuda::Fragments& fragments, bool half, const char* name, Location where) {
  warp_collective(name, fragments, half ? multiply<E, 8> : multiply<E, 16>, where);
}
template void multiply_fragments<cuda::BFloat16>(cuda::Fragments&, bool, const char*, Location);
template void multiply_fragments<cuda::Float16>(cuda::Fragments&, bool, const char*, Location);

namespace {

// The lanes of a matrix give the addresses of its rows.
void note_conflicts(const auto& lanes, int matrix, Location where) {
  uint32_t addresses[8];
  for (int i = 0; i < 8; ++i) addresses[i] = shared_address(lanes[8 * matrix + i].row, where);
  note_bank_conflicts(bank_ways(addresses), where);
}

}  // namespace

void load_matrices(uint32_t (&r)[4], const void* row, bool transposed, Location where) {
  const char* name = transposed ? "load_matrices_transposed" : "load_matrices";
  struct {
    const void* row;
    uint32_t* r;
  } payload{checked_shared(row, 16, 16, name, where), r};
  warp_collective(
      name, payload,
      [&](const auto& lanes) {
        for (int matrix = 0; matrix < 4; ++matrix) {
          note_conflicts(lanes, matrix, where);
          uint16_t numbers[8][8];
          for (int i = 0; i < 8; ++i) std::memcpy(numbers[i], lanes[8 * matrix + i].row, 16);
          for (int lane = 0; lane < 32; ++lane) {
            const int i = lane / 4, j = lane % 4 * 2;
            const uint32_t low = transposed ? numbers[j][i] : numbers[i][j];
            const uint32_t high = transposed ? numbers[j + 1][i] : numbers[i][j + 1];
            lanes[lane].r[matrix] = low | high << 16;
          }
        }
      },
      where);
}

void store_matrices(void* row, const uint32_t* r, int matrices, Location where) {
  if (capability() < 90) fail("store_matrices needs compute capability 9.0", where);
  const bool counts = lane_index() < 8 * matrices;
  unsigned char* checked = counts ? checked_shared(row, 16, 16, "store_matrices", where) : nullptr;
  struct {
    unsigned char* row;
    const uint32_t* r;
  } payload{checked, r};
  warp_collective(
      "store_matrices", payload,
      [&](const auto& lanes) {
        for (int matrix = 0; matrix < matrices; ++matrix) {
          note_conflicts(lanes, matrix, where);
          for (int lane = 0; lane < 32; ++lane) {
            unsigned char* to = lanes[8 * matrix + lane / 4].row + lane % 4 * 4;
            std::memcpy(to, &lanes[lane].r[matrix], 4);
          }
        }
      },
      where);
}

}  // namespace diffit::emulation
