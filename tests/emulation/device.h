// A CUDA device in software, which runs kernels that were compiled for the host. Blocks run one
// after another, a block's threads take turns (fiber.h). Kernels see emulation.h and cuda/; this is
// what those, and the twins of the headers in csrc/cuda/ptx/, are made of.
//
// Errors are exceptions: what a thread throws, and what is found out about the block (a deadlock),
// comes out of launch() as std::runtime_error that names the kernel, the block and the thread.
//
// DIFFIT_EMULATION_ORDER says who is next when several threads could go on: "ascending" (the
// default) and "descending" by index, so that warps run as far ahead of others as they can, or
// "random:1", of any seed. A kernel must give the same result to the bit in all of them.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <source_location>
#include <string>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace diffit::emulation {

// Where a kernel calls what a device has built in. As a default argument it is the caller's line.
using Location = std::source_location;

struct Launch {
  std::string what;  // the kernel and its shapes
  dim3 grid;
  int threads, shared_bytes;
};

void launch(const Launch&, const std::function<void()>& kernel);

// What the device is: compute capability 90, 4 multiprocessors and as much shared memory as a block
// has on such a device, or what DIFFIT_EMULATION_CAPABILITY, DIFFIT_EMULATION_MULTIPROCESSORS and
// DIFFIT_EMULATION_SHARED_MEMORY say.
int capability();
int multiprocessors();
int shared_memory_limit();
void check_shared(int bytes, const std::string& what);  // that a block has so much

// For a thread of the block that runs:

int thread_index();
inline int warp_index() { return thread_index() / 32; }
inline int lane_index() { return thread_index() % 32; }

// Ends the launch with an error: "<kernel>, block (0, 0, 0), thread 37 (warp 1, lane 5), at
// x.cu:88: <message>".
[[noreturn]] void fail(const std::string& message, Location where);

// The block's shared memory, exactly as much as its launch asked for. Before each block it is
// filled with bytes 0xff, which are NaN in every format. AddressSanitizer knows where it ends.
unsigned char* shared_memory();
int shared_bytes();

// An address in shared memory, as instructions take it: the offset from its beginning.
uint32_t shared_address(const void* pointer, Location where);

// Fails unless `bytes` bytes from there lie in shared memory, aligned. `operation` is for the
// error.
unsigned char* checked_shared(const void* pointer, int bytes, int alignment, const char* operation,
                              Location where);

// The T of this thread, or of this block: what a twin has to remember. Made by T() when first asked
// for, gone when the block ends.
template <class T>
T& of_thread();
template <class T>
T& of_block();

// For threads that meet:

// A payload of each of the threads that meet, by lane of the warp or by index in the group.
template <class Payload>
class Payloads {
 public:
  explicit Payloads(void** pointers) : pointers_(pointers) {}
  Payload& operator[](int i) const { return *static_cast<Payload*>(pointers_[i]); }

 private:
  void** pointers_;
};

// Threads `first` to `first + count - 1` all come here with a payload, from the same line of the
// kernel; function(payloads) is called once, by the last of them; then all go on. `name` must
// outlive the launch. Whole warps.
template <class Payload, class Function>
void group_collective(int first, int count, const char* name, Payload& payload, Function function,
                      Location where);

// The same for the 32 threads of this thread's warp.
template <class Payload, class Function>
void warp_collective(const char* name, Payload& payload, Function function, Location where) {
  group_collective(warp_index() * 32, 32, name, payload, function, where);
}

// Barrier `id` of the block, for `threads` threads, which are whole warps. 0 is __syncthreads, for
// all threads of the block and from one line of the kernel.
void barrier(int id, int threads, Location where);

// Waits until ready(), which may be called at any time, by any thread. `description` is for the
// list of who waits for what, in the error of a deadlock. Whoever changes what others may wait for
// calls state_changed(), so that they are asked again soon; they are in any case when no thread can
// go on.
void block_until(const std::function<bool()>& ready, const std::string& description,
                 Location where);
void state_changed();

// Something that the device does by itself, at some later time: as late as possible in ascending
// order (when no thread can go on, the oldest first), as soon as possible in descending order, at
// any time in random order. It runs on any thread's stack and must not wait for others. It is an
// error if the block ends before it is done.
void asynchronously(const std::string& description, std::function<void()> action, Location where);

// For tests:

// What was seen of a kernel, by `what` of its launches.
struct Statistics {
  int64_t launches = 0;
  int shared_bytes = 0;    // the most that a launch asked for
  int bank_conflicts = 1;  // the most turns that one matrix took in ldmatrix or stmatrix
  std::string where;       // of that one: x.cu:88
};
void note_bank_conflicts(int ways, Location where);
const std::map<std::string, Statistics>& all_statistics();

// How the templates above are done:

namespace detail {
size_t next_slot();
template <class T>
inline const size_t slot = next_slot();
using Slots = std::vector<std::shared_ptr<void>>;
Slots& slots_of_thread();
Slots& slots_of_block();

template <class T>
T& in(Slots& slots) {
  if (slots.size() <= slot<T>) slots.resize(slot<T> + 1);
  if (slots[slot<T>] == nullptr) slots[slot<T>] = std::make_shared<T>();
  return *static_cast<T*>(slots[slot<T>].get());
}

// The payloads for the last thread that comes, null for the others, once the last one has called
// part().
void** meet(int first, int count, const char* name, void* payload, Location where);
void part(int first, int count);
}  // namespace detail

template <class T>
T& of_thread() {
  return detail::in<T>(detail::slots_of_thread());
}

template <class T>
T& of_block() {
  return detail::in<T>(detail::slots_of_block());
}

template <class Payload, class Function>
void group_collective(int first, int count, const char* name, Payload& payload, Function function,
                      Location where) {
  if (void** payloads = detail::meet(first, count, name, &payload, where)) {
    function(Payloads<Payload>(payloads));
    detail::part(first, count);
  }
}

}  // namespace diffit::emulation
