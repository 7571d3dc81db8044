// Faults that kernels for Hopper may have, planted. `faults_hopper <name>` prints how the fault
// shows, or "nothing".
#include <cstdio>

#include "product_hopper.cuh"

using namespace diffit;
using namespace diffit::cuda;

namespace {

// A from ordinary stores, times itself.
void stores_kernel(Ring ring) {
  auto* numbers = reinterpret_cast<uint16_t*>(shared_memory());
  for (int i = threadIdx.x; i < 64 * 16; i += 128) {
    numbers[i / 16 % 8 * 8 + i / 128 * 128 + i % 16 / 8 * 64 + i % 8] = 0;
  }
  if (ring.fault != RingFault::kNoProxyFence) fence_async_proxy();
  __syncthreads();
  float d[32];
  wgmma_fence();
  const uint64_t a = matrix(numbers, 128, 256, Swizzle::kNone);
  Wgmma<BFloat16, 64>::run(d, a, a, false);
  wgmma_commit();
  wgmma_wait<0>();
  for (float number : d) ring.d[0] += number;
}

void one_warp(Ring) {
  if (threadIdx.x >= 32) return;
  float d[32];
  wgmma_fence();
  const uint64_t a = matrix(shared_memory(), 128, 256, Swizzle::kNone);
  Wgmma<BFloat16, 64>::run(d, a, a, false);
  wgmma_commit();
  wgmma_wait<0>();
}

void two_inits(Ring) {
  if (threadIdx.x >= 2) return;
  barrier_init(reinterpret_cast<uint64_t*>(shared_memory()), 1);
}

void no_init(Ring) { barrier_wait(reinterpret_cast<uint64_t*>(shared_memory()), 0); }

void many_registers(Ring) { take_registers<240>(); }

void odd_registers(Ring) { give_registers<100>(); }

void no_store_wait(Ring ring) {
  if (threadIdx.x != 0) return;
  store_box(ring.a, shared_memory(), 0, 0, 0, 0);
  commit_stores();
}

void run(void (*kernel)(Ring), RingFault fault, const std::string& name) {
  float d[1] = {};
  alignas(16) uint16_t data[64 * 8] = {};
  const TensorMap map = tensor_map(data, Number::kFloat16, 8, 64, 1, 1, 8, 64, 1, 0);
  launch(kernel, Ring{map, map, data, d, 1, fault}, 1, 128, 4096, nullptr, name);
  if (std::isnan(d[0])) throw std::runtime_error("NaN");
}

void show(const std::string& name) {
  const std::map<std::string, RingFault> rings = {
      {"no_fault", RingFault::kNone},
      {"no_wait", RingFault::kNoWait},
      {"no_products_wait", RingFault::kNoProductsWait},
      {"early_release", RingFault::kEarlyRelease},
      {"consumer_parity", RingFault::kConsumerParity},
      {"producer_parity", RingFault::kProducerParity},
      {"no_expect", RingFault::kNoExpect},
      {"few_bytes", RingFault::kFewBytes},
      {"many_bytes", RingFault::kManyBytes},
      {"many_arrivals", RingFault::kManyArrivals},
      {"no_barrier_fence", RingFault::kNoBarrierFence},
      {"barrier_overwritten", RingFault::kBarrierOverwritten},
      {"wrong_leading", RingFault::kWrongLeading},
      {"large_offset", RingFault::kLargeOffset},
      {"unaligned_tile", RingFault::kUnalignedTile},
      {"unaligned_matrix", RingFault::kUnalignedMatrix},
      {"out_of_bounds", RingFault::kOutOfBounds},
      {"no_fence", RingFault::kNoFence},
      {"part_of_warpgroup", RingFault::kPartOfWarpgroup},
      {"written_d", RingFault::kWrittenD},
      {"written_a", RingFault::kWrittenA},
  };
  const std::map<std::string, void (*)(Ring)> kernels = {
      {"with_proxy_fence", stores_kernel},
      {"no_proxy_fence", stores_kernel},
      {"one_warp", one_warp},
      {"two_inits", two_inits},
      {"no_init", no_init},
      {"many_registers", many_registers},
      {"odd_registers", odd_registers},
      {"no_store_wait", no_store_wait},
  };
  if (rings.contains(name)) {
    RingOf<BFloat16, 96, true, 64, true>::check(5, rings.at(name));
  } else if (kernels.contains(name)) {
    const bool unfenced = name == "no_proxy_fence";
    run(kernels.at(name), unfenced ? RingFault::kNoProxyFence : RingFault::kNone, name);
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
  RingOf<Float16, 64, false, 128, false>::check(3, RingFault::kNone);
}
