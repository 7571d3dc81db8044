// The emulation against plain loops. What must go wrong, and how, is in faults.cpp.
#include <cstdio>

#include "product.cuh"

using namespace diffit;
using namespace diffit::cuda;

namespace {

void expect(bool truth, const std::string& what) {
  if (!truth) throw std::runtime_error("not so: " + what);
}

struct Ints {
  int* data;
};

void run(void (*kernel)(Ints), std::vector<int>& results, int threads, dim3 grid = 1,
         int bytes = 4096) {
  launch(kernel, Ints{results.data()}, grid, threads, bytes, nullptr, "self test");
}

// Every number of 16 bits is what its float rounds to, and so are the floats around it: up to the
// middle between two, where the even one has it.
template <class E>
void check_rounding(int infinity) {
  for (int sign : {0, 0x8000}) {
    for (int bits = 0; bits < infinity; ++bits) {
      const E number{uint16_t(sign | bits)}, next{uint16_t(sign | (bits + 1))};
      const float x = to_float(number);
      // As if the exponent went on, infinity is as far from the largest number as that from the one
      // before it.
      const float step =
          bits + 1 < infinity ? to_float(next) - x : x - to_float(E{uint16_t(sign | (bits - 1))});
      const float middle = x + step / 2;
      const uint16_t even = bits % 2 == 0 ? number.bits : next.bits;
      const std::string where = std::to_string(sign | bits);
      expect(rounded<E>(x).bits == number.bits, "rounding of " + where);
      expect(rounded<E>(middle).bits == even, "middle after " + where);
      expect(rounded<E>(std::nextafterf(middle, x)).bits == number.bits, "below middle " + where);
      expect(rounded<E>(std::nextafterf(middle, x + 2 * step)).bits == next.bits,
             "above middle " + where);
    }
    const E infinite{uint16_t(sign | infinity)};
    expect(std::isinf(to_float(infinite)), "infinity");
    expect(rounded<E>(to_float(infinite)).bits == infinite.bits, "infinity is kept");
    expect(std::isnan(to_float(E{uint16_t(sign | (infinity + 1))})), "NaN");
  }
  expect(rounded<E>(NAN).bits == 0x7fff, "NaN is kept");
}

void numbers() {
  check_rounding<BFloat16>(0x7f80);
  check_rounding<Float16>(0x7c00);
  float low, high;
  unpack<Float16>(pack<Float16>(1.5f, -2.0f), low, high);
  expect(low == 1.5f && high == -2.0f, "low is first");
  unpack<BFloat16>(0xc0003fc0u, low, high);
  expect(low == 1.5f && high == -2.0f, "low is first");
  expect(exp2_approx(-INFINITY) == 0 && exp2_approx(-127) == 0 && exp2_approx(-126) == 0x1p-126f &&
             exp2_approx(3) == 8 && std::isnan(exp2_approx(NAN)),
         "exp2_approx");
}

void index_kernel(const Ints ints) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  ints.data[block * blockDim.x + threadIdx.x] += block * 1000 + int(threadIdx.x);
}

void indices() {
  const dim3 grid(3, 2, 4);
  std::vector<int> results(24 * 96);
  run(index_kernel, results, 96, grid);
  for (int i = 0; i < 24 * 96; ++i) expect(results[i] == i / 96 * 1000 + i % 96, "indices");
}

void warp_kernel(const Ints ints) {
  const int lane = threadIdx.x % 32, all = 0xffffffff;
  int* results = ints.data + threadIdx.x * 8;
  results[0] = __shfl_sync(all, lane, 5);
  results[1] = __shfl_sync(all, lane, lane + 1, 8);
  results[2] = __shfl_up_sync(all, lane, 2u, 16);
  results[3] = int(__shfl_down_sync(all, 2.0f * float(lane), 3u));
  results[4] = __shfl_xor_sync(all, lane, 9);
  results[5] = __ballot_sync(all, lane % 3 == 0);
  results[6] = __any_sync(all, lane == 7 && threadIdx.x >= 32);
  results[7] = __all_sync(all, lane < 32 && threadIdx.x >= 32);
}

void warps() {
  std::vector<int> results(64 * 8);
  run(warp_kernel, results, 64);
  for (int i = 0; i < 64; ++i) {
    const int lane = i % 32, *own = &results[i * 8];
    expect(own[0] == 5 && own[1] == lane / 8 * 8 + (lane + 1) % 8, "__shfl_sync");
    expect(own[2] == (lane % 16 < 2 ? lane : lane - 2), "__shfl_up_sync");
    expect(own[3] == 2 * (lane + 3 < 32 ? lane + 3 : lane), "__shfl_down_sync");
    expect(own[4] == (lane ^ 9), "__shfl_xor_sync");
    expect(own[5] == 0x49249249 && own[6] == i / 32 && own[7] == i / 32, "votes");
  }
}

// Neighbours' numbers through shared memory, in rounds: right in any order only with both barriers.
void barrier_kernel(const Ints ints) {
  int* memory = reinterpret_cast<int*>(shared_memory());
  const int thread = threadIdx.x, threads = blockDim.x;
  int number = thread;
  for (int round = 0; round < 5; ++round) {
    memory[thread] = number;
    __syncthreads();
    number = memory[(thread + 33) % threads];
    __syncthreads();
  }
  // Two warps at a time, by barriers of their own, that come to them at different times.
  const int pair = thread / 64;
  for (int round = 0; round <= pair; ++round) {
    memory[thread] = number;
    emulation::barrier(1 + pair, 64, emulation::Location::current());
    number = memory[pair * 64 + (thread + 32) % 64];
    emulation::barrier(1 + pair, 64, emulation::Location::current());
  }
  ints.data[thread] = number;
}

void barriers() {
  std::vector<int> results(256);
  run(barrier_kernel, results, 256);
  for (int i = 0; i < 256; ++i) {
    const int from = i / 64 * 64 + (i / 64 % 2 == 0 ? i + 32 : i) % 64;
    expect(results[i] == (from + 5 * 33) % 256, "barriers");
  }
}

// Warp 0 hands numbers over, one at a time, by words that block_until looks at. What the device
// does by itself comes between.
void waiting_kernel(const Ints ints) {
  struct Hand {
    int full = 0, taken = 0, number;
  };
  Hand& hand = emulation::of_block<Hand>();
  const auto where = emulation::Location::current();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = 0; i < 10; ++i) {
    if (warp == 0 && lane == 0) {
      emulation::block_until([&] { return hand.taken == 32 * i; }, "an empty hand", where);
      emulation::asynchronously(
          "a number",
          [&hand, i] {
            hand.number = i * i;
            hand.full = i + 1;
          },
          where);
    } else if (warp == 1) {
      emulation::block_until([&] { return hand.full == i + 1; }, "a number", where);
      ints.data[i * 32 + lane] = hand.number;
      hand.taken += 1;
      emulation::state_changed();
    }
  }
}

void waiting() {
  std::vector<int> results(320);
  run(waiting_kernel, results, 64);
  for (int i = 0; i < 320; ++i) expect(results[i] == (i / 32) * (i / 32), "numbers handed over");
}

void group_kernel(const Ints ints) {
  int number = threadIdx.x;
  emulation::group_collective(
      threadIdx.x / 128 * 128, 128, "sum", number,
      [](const auto& group) {
        int sum = 0;
        for (int i = 0; i < 128; ++i) sum += group[i];
        for (int i = 0; i < 128; ++i) group[i] = sum;
      },
      emulation::Location::current());
  ints.data[threadIdx.x] = number;
}

void groups() {
  std::vector<int> results(256);
  run(group_kernel, results, 256);
  for (int i = 0; i < 256; ++i) expect(results[i] == 127 * 64 + i / 128 * 128 * 128, "sums");
}

// Copies arrive group by group, the zeros of an invalid one too.
void copy_kernel(const Ints ints) {
  if (threadIdx.x != 0) return;
  int* memory = reinterpret_cast<int*>(shared_memory());
  for (int group = 0; group < 3; ++group) {
    copy_async(memory + 8 * group, ints.data, true);
    copy_async(memory + 8 * group + 4, ints.data + 1000000, false);
    commit_copies();
  }
  wait_copies<1>();
  for (int i = 0; i < 24; ++i) ints.data[8 + i] = memory[i];
  wait_copies<0>();
  ints.data[32] = memory[19];
}

void copies() {
  alignas(16) static int data[40] = {1, 2, 3, 4};
  launch(copy_kernel, Ints{data}, 1, 32, 96, nullptr, "copies");
  for (int i = 0; i < 24; ++i) {
    expect(data[8 + i] == (i >= 16 ? -1 : i % 8 < 4 ? i % 8 + 1 : 0), "copies waited for");
  }
  expect(data[32] == 4, "the last copy");
}

// A (16, 8) B (8, 8), from rows of 64 bytes: every other one lies in the same banks.
template <class E>
void half_kernel(const Product args) {
  auto* memory = reinterpret_cast<uint16_t*>(shared_memory());
  const int lane = threadIdx.x;
  if (lane < 24) {
    const uint16_t* from = lane < 16 ? args.a + lane * 8 : args.b + (lane - 16) * 8;
    for (int i = 0; i < 8; ++i) memory[32 * lane + i] = from[i];
  }
  __syncwarp();
  float d[4] = {};
  uint32_t a[4], b[4];
  load_matrices(a, memory + 32 * (lane % 16));
  load_matrices_transposed(b, memory + 32 * (16 + lane % 8));
  mma_half<E>(d, a[0], a[1], b[0]);
  for (int i = 0; i < 4; ++i) args.c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

template <class E>
void check_half() {
  const auto a = integers<E>(16 * 8), b = integers<E>(8 * 8);
  std::vector<float> c(16 * 8);
  launch(half_kernel<E>, Product{a.data(), b.data(), c.data(), Fault::kNone}, 1, 32, 24 * 64,
         nullptr, "half");
  compare<E>(c, a, b, 8, 8);
}

// Four and two matrices from registers to rows, and back.
void store_kernel(const Ints ints) {
  const int lane = threadIdx.x;
  uint32_t four[4], two[2], read[4];
  for (int m = 0; m < 4; ++m) four[m] = 0x10001 * (100 * m + 2 * lane) + 0x10000;
  for (int m = 0; m < 2; ++m) two[m] = ~four[m];
  store_matrices(shared_memory() + 16 * lane, four);
  load_matrices(read, shared_memory() + 16 * lane);
  const auto* numbers = reinterpret_cast<uint16_t*>(shared_memory());
  for (int m = 0; m < 4; ++m) ints.data[m * 32 + lane] = read[m] == four[m];
  __syncwarp();
  store_matrices(lane < 16 ? shared_memory() + 16 * lane : nullptr, two);
  load_matrices(read, shared_memory() + 16 * lane);
  for (int m = 0; m < 4; ++m) {
    ints.data[m * 32 + lane] += read[m] == (m < 2 ? two[m] : four[m]);
  }
  ints.data[128 + lane] = numbers[192 + lane];
}

void stores() {
  std::vector<int> results(160);
  run(store_kernel, results, 32);
  for (int i = 0; i < 128; ++i) expect(results[i] == 2, "matrices are stored and loaded");
  for (int i = 0; i < 32; ++i) expect(results[128 + i] == 300 + i, "rows of the last matrix");
}

// Products of fragments that ldmatrix makes, and the conflicts that its rows meet.
void products() {
  check_product<BFloat16>(Fault::kNone);
  check_product<Float16>(Fault::kNone);
  check_half<BFloat16>();
  check_half<Float16>();
  const auto& all = emulation::all_statistics();
  expect(all.at("product").bank_conflicts == 1, "padded rows meet no conflict");
  expect(all.at("half").bank_conflicts == 4, "rows of 64 bytes do");
  expect(all.at("half").where.starts_with("self_test.cpp:"), "and it is said where");
}

}  // namespace

int main() {
  try {
    numbers();
    indices();
    warps();
    barriers();
    waiting();
    groups();
    copies();
    stores();
    products();
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 1;
  }
}
