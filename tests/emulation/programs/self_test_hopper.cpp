// The emulation of what only Hopper has against plain loops. What must go wrong, and how, is in
// faults_hopper.cpp.
#include <cstdio>

#include "product_hopper.cuh"

using namespace diffit;
using namespace diffit::cuda;

namespace {

void expect(bool truth, const std::string& what) {
  if (!truth) throw std::runtime_error("not so: " + what);
}

template <class E, int N, bool kMajorB, bool kRegisters>
void swizzles() {
  RingOf<E, N, kMajorB, 0, kRegisters>::check(1, RingFault::kNone);
  RingOf<E, N, kMajorB, 64, kRegisters>::check(2, RingFault::kNone);
  RingOf<E, N, kMajorB, 128, kRegisters>::check(5, RingFault::kNone);
}

template <int N>
void products() {
  swizzles<BFloat16, N, false, false>();
  swizzles<BFloat16, N, true, false>();
  swizzles<Float16, N, false, true>();
  swizzles<BFloat16, N, true, true>();
}

// A box of 8 x 3 x 2 of a (2, 4, 5, 16) tensor, and what of it lies outside.
struct Boxes {
  TensorMap from, to;
  int c, x, y, b;
  uint16_t* seen;
};

constexpr int kBox = 8 * 3 * 2;

void box_kernel(Boxes boxes) {
  unsigned char* memory = shared_memory();
  uint64_t* barrier = reinterpret_cast<uint64_t*>(memory + 1024);
  if (threadIdx.x != 0) return;
  barrier_init(barrier, 1);
  fence_barriers();
  barrier_arrive_expecting(barrier, 2 * kBox);
  prefetch_map(boxes.from);
  copy_box(memory, boxes.from, barrier, boxes.c, boxes.x, boxes.y, boxes.b);
  barrier_wait(barrier, 0);
  uint16_t* numbers = reinterpret_cast<uint16_t*>(memory);
  for (int i = 0; i < kBox; ++i) {
    boxes.seen[i] = numbers[i];
    numbers[i] += 1000;
  }
  fence_async_proxy();
  store_box(boxes.to, memory, boxes.c, boxes.x, boxes.y, boxes.b);
  commit_stores();
  wait_stores_read();
}

void boxes(int c, int x, int y, int b) {
  alignas(16) uint16_t from[2 * 4 * 5 * 16], to[2 * 4 * 5 * 16] = {};
  for (int i = 0; i < 640; ++i) from[i] = i + 1;
  uint16_t seen[kBox];
  const auto map = [](uint16_t* data) {
    return tensor_map(data, Number::kFloat16, 16, 5, 4, 2, 8, 3, 2, 0);
  };
  launch(box_kernel, Boxes{map(from), map(to), c, x, y, b, seen}, 1, 32, 2048, nullptr, "boxes");
  int inside = 0;
  for (int i = 0; i < kBox; ++i) {
    const int channel = c + i % 8, column = x + i / 8 % 3, row = y + i / 24;
    const bool valid = channel >= 0 && channel < 16 && column >= 0 && column < 5 && row >= 0 &&
                       row < 4 && b >= 0 && b < 2;
    const int at = ((b * 4 + row) * 5 + column) * 16 + channel;
    expect(seen[i] == (valid ? from[at] : 0), "what a box has");
    if (valid) expect(to[at] == from[at] + 1000, "what a box leaves");
    inside += valid;
  }
  for (uint16_t number : to) inside -= number != 0;
  expect(inside == 0, "a box leaves nothing outside itself");
}

// A producer gives registers to two warpgroups that multiply.
void register_kernel(Boxes boxes) {
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    give_registers<24>();
  } else {
    take_registers<240>();
    sync_some(1, 256);
  }
  if (threadIdx.x % 128 == 0) boxes.seen[warpgroup] = warpgroup;
}

void registers() {
  uint16_t seen[3] = {9, 9, 9};
  Boxes boxes{};
  boxes.seen = seen;
  launch(register_kernel, boxes, 1, 384, 0, nullptr, "registers");
  expect(seen[0] == 0 && seen[1] == 1 && seen[2] == 2, "registers");
}

}  // namespace

int main() {
  try {
    products<8>();
    products<32>();
    products<64>();
    products<72>();
    products<96>();
    products<128>();
    boxes(0, 0, 0, 0);
    boxes(8, 2, 2, 1);
    boxes(-8, -1, -1, 0);
    boxes(12, 4, 3, 1);
    boxes(0, 0, 0, 2);
    registers();
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 1;
  }
}
