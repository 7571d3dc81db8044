// Faults that kernels may have, planted. `faults <name>` prints how the fault shows, or "nothing".
#include <cstdio>
#include <cstring>

#include "product.cuh"

using namespace diffit;
using namespace diffit::cuda;

namespace {

struct Numbers {
  float* data;
};

constexpr int kThreads = 128;

void sum_neighbours(Numbers numbers, bool first_barrier, bool second_barrier) {
  float* memory = reinterpret_cast<float*>(shared_memory());
  const int thread = threadIdx.x;
  float number = thread;
  for (int round = 0; round < 3; ++round) {
    memory[thread] = number;
    if (first_barrier) __syncthreads();
    number += memory[(thread + 1) % kThreads];
    if (second_barrier) __syncthreads();
  }
  numbers.data[thread] = number;
}
void no_first_barrier(Numbers numbers) { sum_neighbours(numbers, false, true); }
void no_second_barrier(Numbers numbers) { sum_neighbours(numbers, true, false); }
void both_barriers(Numbers numbers) { sum_neighbours(numbers, true, true); }

// Only the lower half of each warp takes part.
void diverged(Numbers numbers) {
  if (threadIdx.x % 32 < 16) {
    numbers.data[threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 0);
  }
}

// Both halves take part, in different instructions.
void mismatched(Numbers numbers) {
  if (threadIdx.x % 32 < 16) {
    numbers.data[threadIdx.x] = __shfl_sync(0xffffffffu, 1.0f, 0);
  } else {
    numbers.data[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  }
}

void partial_mask(Numbers numbers) { numbers.data[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 0); }

// Warp 3 waits for a barrier that the others do not come to.
void deadlock(Numbers) {
  if (threadIdx.x < 32) return;
  if (threadIdx.x >= 96) emulation::barrier(2, 64, emulation::Location::current());
  __syncthreads();
}

void two_barriers(Numbers numbers) {
  if (threadIdx.x < 64) {
    __syncthreads();
  } else {
    numbers.data[0] = 1;
    __syncthreads();
  }
}

void barrier_counts(Numbers) {
  emulation::barrier(1, threadIdx.x < 64 ? 64 : 96, emulation::Location::current());
}

void past_the_end(Numbers numbers) {
  numbers.data[threadIdx.x] = reinterpret_cast<float*>(shared_memory())[threadIdx.x * 9];
}

// Nobody writes what is read.
void uninitialised(Numbers numbers) {
  numbers.data[threadIdx.x] = reinterpret_cast<float*>(shared_memory())[threadIdx.x];
}

void unaligned_copy(Numbers numbers) {
  copy_async(shared_memory() + 16 * (threadIdx.x % 4) + 8, numbers.data, true);
}

void wrong_pointer(Numbers numbers) { shared_address(numbers.data); }

void old_device(Numbers) {
  const uint32_t r[4] = {};
  store_matrices(shared_memory() + 16 * (threadIdx.x % 32), r);
}

void left_behind(Numbers) {
  if (threadIdx.x == 5) {
    emulation::asynchronously("the last copy", [] {}, emulation::Location::current());
  }
}

void never(Numbers) {
  if (threadIdx.x < 40) return;
  emulation::block_until([] { return false; }, "phase 1 of a barrier",
                         emulation::Location::current());
}

void overflow(Numbers numbers) {
  volatile float frame[100 * 1024];
  frame[threadIdx.x] = 1;
  numbers.data[0] = frame[threadIdx.x];
}

std::vector<float> results(void (*kernel)(Numbers), const char* name) {
  alignas(16) float data[kThreads] = {};
  launch(kernel, Numbers{data}, dim3(2, 1, 1), kThreads, 4 * kThreads, nullptr, name);
  return std::vector<float>(data, data + kThreads);
}

void show(const std::string& name) {
  const std::map<std::string, void (*)(Numbers)> kernels = {
      {"no_first_barrier", no_first_barrier},
      {"no_second_barrier", no_second_barrier},
      {"diverged", diverged},
      {"mismatched", mismatched},
      {"partial_mask", partial_mask},
      {"deadlock", deadlock},
      {"two_barriers", two_barriers},
      {"barrier_counts", barrier_counts},
      {"past_the_end", past_the_end},
      {"uninitialised", uninitialised},
      {"unaligned_copy", unaligned_copy},
      {"wrong_pointer", wrong_pointer},
      {"old_device", old_device},
      {"left_behind", left_behind},
      {"never", never},
      {"overflow", overflow},
  };
  const std::map<std::string, Fault> products = {
      {"swapped_fragments", Fault::kSwappedFragments},
      {"no_sync", Fault::kNoSync},
      {"no_wait", Fault::kNoWait},
      {"unaligned", Fault::kUnaligned},
      {"out_of_bounds", Fault::kOutOfBounds},
  };
  if (products.contains(name)) {
    check_product<BFloat16>(products.at(name));
  } else if (kernels.contains(name)) {
    const auto wrong = results(kernels.at(name), name.c_str());
    if (std::isnan(wrong[0])) throw std::runtime_error("NaN");
    if (name.ends_with("barrier") && wrong != results(both_barriers, "both_barriers")) {
      throw std::runtime_error("wrong sums");
    }
  } else if (name == "too_much_memory") {
    launch(uninitialised, Numbers{}, 1, 32, 100 * 1024, nullptr, "a kernel of (2, 3)");
  } else if (name == "too_many_threads") {
    launch(uninitialised, Numbers{}, 1, 1056, 0, nullptr, "a kernel of (2, 3)");
  } else if (name == "empty_grid") {
    launch(uninitialised, Numbers{}, 0, 32, 0, nullptr, "a kernel of (2, 3)");
  } else {
    throw std::runtime_error("there is no fault " + name);
  }
}

}  // namespace

// After an error the next launch must be as good as any.
int main(int, char** arguments) {
  for (char** name = arguments + 1; *name != nullptr; ++name) {
    try {
      show(*name);
      std::printf("%s: nothing\n", *name);
    } catch (const std::runtime_error& error) {
      std::printf("%s: %s\n", *name, error.what());
    }
    std::fflush(stdout);
  }
  check_product<Float16>(Fault::kNone);
}
