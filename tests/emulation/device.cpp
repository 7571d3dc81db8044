// Launches, and what a thread can ask of its block.
#include "device.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <numeric>
#include <stdexcept>

#include "block.h"
#include "emulation.h"
#include "report.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace diffit::emulation {

Block block;

namespace {

std::map<std::string, Statistics> statistics_by_kernel;
std::mutex one_launch_at_a_time;

void describe_crash(char* text, size_t size) {
  std::snprintf(text, size, "\ncrash in %s\n", thread_text().c_str());
}

int setting(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr ? std::atoi(value) : otherwise;
}

// A block's memory while a launch lasts: of exactly as many bytes as it asks for, of which
// AddressSanitizer knows the end.
class SharedMemory {
 public:
  explicit SharedMemory(const Launch& launch)
      : bytes(launch.shared_bytes), room((bytes + 2047) / 1024 * 1024) {
    block.launch = &launch;
    block.shared = static_cast<unsigned char*>(std::aligned_alloc(1024, room));
    if (block.shared == nullptr) throw std::bad_alloc();
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(block.shared + bytes, room - bytes);
#endif
  }
  ~SharedMemory() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(block.shared + bytes, room - bytes);
#endif
    std::free(block.shared);
    block.shared = nullptr;
    block.launch = nullptr;
  }
  SharedMemory(const SharedMemory&) = delete;

 private:
  const size_t bytes, room;
};

std::vector<int64_t> order_of_blocks(const dim3& grid) {
  std::vector<int64_t> order(int64_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  if (block.order == Order::kDescending) std::reverse(order.begin(), order.end());
  if (block.order == Order::kRandom) std::shuffle(order.begin(), order.end(), block.random);
  return order;
}

void check(const Launch& launch) {
  const auto [x, y, z] = launch.grid;
  auto refuse = [&](const std::string& why) { throw std::runtime_error(launch.what + ": " + why); };
  if (x < 1 || x > 0x7fffffff || y < 1 || y > 65535 || z < 1 || z > 65535) {
    refuse("a grid of " + std::to_string(x) + " x " + std::to_string(y) + " x " +
           std::to_string(z) + " blocks; 1 to 2147483647 x 65535 x 65535 can be launched");
  }
  if (launch.threads < 32 || launch.threads > 1024 || launch.threads % 32 != 0) {
    refuse(std::to_string(launch.threads) + " threads in a block; 32 to 1024 whole warps can be");
  }
  check_shared(launch.shared_bytes, launch.what);
}

}  // namespace

void launch(const Launch& launch, const std::function<void()>& kernel) {
  std::lock_guard lock(one_launch_at_a_time);
  check(launch);
  read_order();
  block.kernel = &kernel;
  block.statistics = &statistics_by_kernel[launch.what];
  block.statistics->launches += 1;
  block.statistics->shared_bytes = std::max(block.statistics->shared_bytes, launch.shared_bytes);
  gridDim = launch.grid;
  blockDim = dim3(launch.threads);
  SharedMemory memory(launch);
  CrashNote note(describe_crash);
  for (int64_t index : order_of_blocks(launch.grid)) {
    const int64_t x = launch.grid.x, y = launch.grid.y;
    blockIdx = {unsigned(index % x), unsigned(index / x % y), unsigned(index / x / y)};
    run_block();
  }
}

int capability() { return setting("DIFFIT_EMULATION_CAPABILITY", 90); }
int multiprocessors() { return setting("DIFFIT_EMULATION_MULTIPROCESSORS", 4); }

int shared_memory_limit() {
  const int of = capability();
  const int kilobytes = of == 80 || of == 87                    ? 163
                        : of == 86 || of == 89 || of / 10 == 12 ? 99
                                                                : 227;
  return setting("DIFFIT_EMULATION_SHARED_MEMORY", kilobytes * 1024);
}

void check_shared(int bytes, const std::string& what) {
  if (bytes >= 0 && bytes <= shared_memory_limit()) return;
  throw std::runtime_error(what + ": " + std::to_string(bytes) +
                           " bytes of shared memory; a block has " +
                           std::to_string(shared_memory_limit()));
}

int thread_index() { return block.running; }
unsigned char* shared_memory() { return block.shared; }
int shared_bytes() { return block.launch != nullptr ? block.launch->shared_bytes : 0; }
const std::map<std::string, Statistics>& all_statistics() { return statistics_by_kernel; }
detail::Slots& detail::slots_of_thread() { return block.threads[block.running].slots; }
detail::Slots& detail::slots_of_block() { return block.slots; }

size_t detail::next_slot() {
  static size_t slot = 0;
  return slot++;
}

void fail(const std::string& message, Location where) {
  throw std::runtime_error(thread_text() + ", at " + text(where) + ": " + message);
}

uint32_t shared_address(const void* pointer, Location where) {
  const auto* byte = static_cast<const unsigned char*>(pointer);
  if (byte < block.shared || byte > block.shared + shared_bytes()) {
    fail("a pointer that does not point into shared memory is taken for one that does", where);
  }
  return byte - block.shared;
}

unsigned char* checked_shared(const void* pointer, int bytes, int alignment, const char* operation,
                              Location where) {
  const int64_t address = static_cast<const unsigned char*>(pointer) - block.shared;
  const bool inside = address >= 0 && address + bytes <= shared_bytes();
  if (!inside || address % alignment != 0) {
    fail(std::string(operation) + ": " + std::to_string(bytes) + " bytes at byte " +
             std::to_string(address) + " of shared memory, " +
             (inside ? "not aligned to " + std::to_string(alignment)
                     : "which has " + std::to_string(shared_bytes())),
         where);
  }
  return block.shared + address;
}

void note_bank_conflicts(int ways, Location where) {
  if (ways <= block.statistics->bank_conflicts) return;
  block.statistics->bank_conflicts = ways;
  block.statistics->where = text(where);
}

std::string text(Location where) {
  const char* name = std::strrchr(where.file_name(), '/');
  return (name != nullptr ? name + 1 : where.file_name()) + (":" + std::to_string(where.line()));
}

std::string text(const char* what, Location where) {
  return std::string(what) + " at " + text(where);
}

std::string block_text() {
  return block.launch->what + ", block (" + std::to_string(blockIdx.x) + ", " +
         std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ")";
}

std::string thread_text() {
  const int thread = block.running;
  if (block.launch == nullptr) return "outside of kernels";
  return block_text() + ", thread " + std::to_string(thread) + " (warp " +
         std::to_string(thread / 32) + ", lane " + std::to_string(thread % 32) + ")";
}

}  // namespace diffit::emulation
