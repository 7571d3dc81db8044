// Barriers that count arrivals and bytes (the PTX ISA's mbarrier), registers handed over between
// warpgroups, and what the asynchronous proxy sees of shared memory.
#include "cuda/ptx/barrier.cuh"

#include <algorithm>
#include <cstring>
#include <map>
#include <vector>

namespace diffit::emulation {
namespace {

constexpr int kLargestCount = (1 << 20) - 1;

struct Barrier {
  int arrivals;           // of each phase
  int pending;            // of this phase
  int64_t phase = 0;      // how many are over
  int64_t bytes = 0;      // expected in this phase and not yet there; below 0, come before that
  int64_t under_way = 0;  // bytes of copies that have been asked for
  int made_by;
  bool visible = false;  // to the asynchronous proxy
  uint64_t word;         // what lies in shared memory in its place
};

struct Barriers {
  std::map<uint32_t, Barrier> at;
};

std::string text(uint32_t address, const Barrier& barrier) {
  return "the barrier at byte " + std::to_string(address) + " of shared memory (phase " +
         std::to_string(barrier.phase) + ", " + std::to_string(barrier.pending) + " of " +
         std::to_string(barrier.arrivals) + " arrivals and " + std::to_string(barrier.bytes) +
         " bytes missing)";
}

// A word that nobody stores by chance, and that changes with the state.
void note(uint64_t* word, Barrier& barrier) {
  barrier.word = (uint64_t(barrier.phase) * 0x9e3779b97f4a7c15u) ^ uint64_t(barrier.pending) << 40 ^
                 uint64_t(barrier.bytes) ^ 0x6ba77ee55eed5a5au;
  *word = barrier.word;
}

Barrier& checked(uint64_t* word, const char* name, Location where, uint32_t* address = nullptr) {
  checked_shared(word, 8, 8, name, where);
  const uint32_t at = shared_address(word, where);
  auto& barriers = of_block<Barriers>().at;
  const auto found = barriers.find(at);
  if (found == barriers.end()) {
    fail(std::string(name) + ": there is no barrier at byte " + std::to_string(at) +
             " of shared memory; barrier_init was not called",
         where);
  }
  if (*word != found->second.word) {
    fail(std::string(name) + ": something was stored over " + text(at, found->second), where);
  }
  if (address != nullptr) *address = at;
  return found->second;
}

// Ends the phase if nothing is missing.
void settle(uint64_t* word, uint32_t address, Barrier& barrier, Location where) {
  if (barrier.pending == 0 && barrier.bytes < 0) {
    fail("more bytes have arrived than were expected by " + text(address, barrier), where);
  }
  if (barrier.pending == 0 && barrier.bytes == 0) {
    if (barrier.under_way != 0) {
      fail(text(address, barrier) + " ends its phase while copies of " +
               std::to_string(barrier.under_way) +
               " bytes to it are under way that it was not told to expect",
           where);
    }
    barrier.phase += 1;
    barrier.pending = barrier.arrivals;
  }
  note(word, barrier);
  state_changed();
}

// A thread's registers, by warpgroup: at first as many as __launch_bounds__(threads, 1) leaves.
struct Registers {
  int of_warpgroup[8];
  int free = 0;  // given back and not yet taken, by a warpgroup's worth
  Registers() {
    const int each = std::min<int>(65536 / blockDim.x, 255) / 8 * 8;
    std::fill(std::begin(of_warpgroup), std::end(of_warpgroup), each);
  }
};

struct View {
  std::vector<unsigned char> bytes = std::vector<unsigned char>(shared_bytes(), 0xff);
};

}  // namespace

void init_barrier(uint64_t* word, int arrivals, Location where) {
  checked_shared(word, 8, 8, "barrier_init", where);
  const uint32_t at = shared_address(word, where);
  auto& barriers = of_block<Barriers>().at;
  if (barriers.contains(at)) {
    fail("barrier_init: byte " + std::to_string(at) + " of shared memory holds a barrier already",
         where);
  }
  if (arrivals < 1 || arrivals > kLargestCount) {
    fail("barrier_init: " + std::to_string(arrivals) + " arrivals; it must be 1 to " +
             std::to_string(kLargestCount),
         where);
  }
  Barrier& barrier = barriers[at];
  barrier.arrivals = barrier.pending = arrivals;
  barrier.made_by = thread_index();
  note(word, barrier);
}

void fence_barriers() {
  for (auto& [at, barrier] : of_block<Barriers>().at) {
    if (barrier.made_by == thread_index()) barrier.visible = true;
  }
}

void arrive(uint64_t* word, int bytes, const char* name, Location where) {
  uint32_t at;
  Barrier& barrier = checked(word, name, where, &at);
  if (bytes < 0 || barrier.bytes + bytes > kLargestCount) {
    fail(std::string(name) + ": " + std::to_string(bytes) + " bytes more than " +
             text(at, barrier) + " can count, " + std::to_string(kLargestCount) + " in all",
         where);
  }
  if (barrier.pending == 0) {
    fail(std::string(name) + ": one arrival more than expected by " + text(at, barrier), where);
  }
  barrier.bytes += bytes;
  barrier.pending -= 1;
  settle(word, at, barrier, where);
}

void begin_copy(uint64_t* word, int bytes, Location where) {
  uint32_t at;
  Barrier& barrier = checked(word, "copy_box", where, &at);
  if (!barrier.visible) {
    fail("copy_box: no fence_barriers has made known " + text(at, barrier), where);
  }
  barrier.under_way += bytes;
}

void end_copy(uint64_t* word, int bytes, Location where) {
  uint32_t at;
  Barrier& barrier = checked(word, "copy_box", where, &at);
  barrier.under_way -= bytes;
  barrier.bytes -= bytes;
  settle(word, at, barrier, where);
}

void wait_for_phase(uint64_t* word, int parity, Location where) {
  uint32_t at;
  Barrier& barrier = checked(word, "barrier_wait", where, &at);
  if (parity != 0 && parity != 1) {
    fail("barrier_wait: parity " + std::to_string(parity) + "; it must be 0 or 1", where);
  }
  const std::string description = "the phase of parity " + std::to_string(parity) +
                                  " of the barrier at byte " + std::to_string(at) +
                                  " of shared memory";
  block_until([&] { return barrier.phase % 2 != parity; }, description, where);
  checked(word, "barrier_wait", where);
}

void set_registers(int count, bool more, const char* name, Location where) {
  const int first = warp_index() / 4 * 128;
  if (first + 128 > int(blockDim.x)) {
    fail(std::string(name) + " by a part of a warpgroup", where);
  }
  int payload = 0;
  group_collective(first, 128, name, payload, [](Payloads<int>) {}, where);
  Registers& registers = of_block<Registers>();
  int& own = registers.of_warpgroup[first / 128];
  if (thread_index() % 128 == 0) {
    const std::string change = std::string(name) + ": from " + std::to_string(own) + " to " +
                               std::to_string(count) + " registers";
    if (count % 8 != 0 || count < 24 || count > 256) {
      fail(change + "; they are multiples of 8 from 24 to 256", where);
    }
    if (more ? count < own : count > own) fail(change, where);
    if (more) {
      const std::string description = std::to_string(count - own) + " registers a thread";
      block_until([&] { return registers.free >= count - own; }, description, where);
    }
    registers.free += own - count;
    own = count;
    state_changed();
  }
  group_collective(first, 128, name, payload, [](Payloads<int>) {}, where);
}

unsigned char* asynchronous_view() { return of_block<View>().bytes.data(); }

void fence_async_proxy() { std::memcpy(asynchronous_view(), shared_memory(), shared_bytes()); }

}  // namespace diffit::emulation
