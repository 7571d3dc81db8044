// Twin of csrc/cuda/ptx/copy.cuh. A copy arrives as late as it may: when this thread waits for it.
// Until then its destination is NaN, and it never arrives if nobody waits.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

#include "cuda/ptx/address.cuh"

namespace diffit::emulation {

struct Copy {
  unsigned char* to;
  int count;
  unsigned char bytes[16];
};

// Of a thread: groups that have been ended, oldest first, and the one that has not.
struct Copies {
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

}  // namespace diffit::emulation

namespace diffit::cuda {

// Bytes that are on their way, or zeros.
template <int kBytes>
void start_copy(void* to, const void* from, bool valid, emulation::Location where) {
  emulation::Copy copy{
      emulation::checked_shared(to, kBytes, kBytes, "copy_async", where), kBytes, {}};
  if (reinterpret_cast<uintptr_t>(from) % kBytes != 0) {
    emulation::fail("copy_async: from an address that is not a multiple of its bytes", where);
  }
  if (valid) std::memcpy(copy.bytes, from, kBytes);
  std::memset(copy.to, 0xff, kBytes);
  emulation::of_thread<emulation::Copies>().open.push_back(copy);
}

inline void copy_async(void* to, const void* from, bool valid,
                       emulation::Location where = emulation::Location::current()) {
  start_copy<16>(to, from, valid, where);
}

inline void copy_async_4(void* to, const void* from, bool valid,
                         emulation::Location where = emulation::Location::current()) {
  start_copy<4>(to, from, valid, where);
}

inline void commit_copies() {
  auto& copies = emulation::of_thread<emulation::Copies>();
  copies.groups.push_back(std::move(copies.open));
  copies.open.clear();
}

template <int kPending>
void wait_copies() {
  auto& groups = emulation::of_thread<emulation::Copies>().groups;
  for (; groups.size() > size_t{kPending}; groups.pop_front()) {
    for (const emulation::Copy& copy : groups.front()) std::memcpy(copy.to, copy.bytes, copy.count);
  }
}

}  // namespace diffit::cuda
