// Boxes of a tensor, copied to and from shared memory by the copy engine: later, zeros outside the
// tensor, and with the 16-byte pieces of a row permuted by the address.
#include "cuda/ptx/tma.cuh"

#include <cstring>
#include <vector>

#include "cuda/ptx/barrier.cuh"

namespace diffit::emulation {
namespace {

int bytes_of(const cuda::TensorMap& map) {
  return 2 * map.box[0] * map.box[1] * map.box[2] * map.box[3];
}

// Where a piece of 16 bytes goes: bits 4 and up of the address change with bits 7 and up.
uint32_t swizzled(uint32_t address, int swizzle) {
  const uint32_t mask = swizzle == 0 ? 0 : swizzle / 16 - 1;
  return address ^ (address >> 7 & mask) << 4;
}

// Calls function(piece, channels): where in shared memory each piece of 8 channels of a box lies,
// and where in the tensor each of its channels; null outside it. `address` is that of the box,
// `begin` its first number.
template <class Function>
void for_each_piece(uint32_t address, const cuda::TensorMap& map, const int64_t (&begin)[4],
                    const Function& function) {
  for (int row = 0; row < map.box[1] * map.box[2] * map.box[3]; ++row) {
    const int64_t at[3] = {begin[1] + row % map.box[1], begin[2] + row / map.box[1] % map.box[2],
                           begin[3] + row / map.box[1] / map.box[2]};
    bool inside = true;
    unsigned char* row_data = map.data;
    for (int i = 0; i < 3; ++i) {
      inside = inside && at[i] >= 0 && at[i] < map.sizes[i + 1];
      row_data += at[i] * map.strides[i + 1];
    }
    for (int c = 0; c < map.box[0]; c += 8, address += 16) {
      unsigned char* channels[8];
      for (int i = 0; i < 8; ++i) {
        const int64_t channel = begin[0] + c + i;
        const bool valid = inside && channel >= 0 && channel < map.sizes[0];
        channels[i] = valid ? row_data + 2 * channel : nullptr;
      }
      function(swizzled(address, map.swizzle), channels);
    }
  }
}

struct Box {
  cuda::TensorMap map;
  uint32_t address;
  int64_t begin[4];
};

// A thread's stores: those of the group that has not ended, and how many boxes of the others have
// not been read.
struct Stores {
  std::vector<Box> open;
  int under_way = 0;
};

// Fails if a box does not fit into shared memory, or does not lie as its swizzle demands.
uint32_t checked_box(const void* data, const cuda::TensorMap& map, const char* name,
                     Location where) {
  check_map(map, name, where);
  const int alignment = map.swizzle == 0 ? 128 : 8 * map.swizzle;  // after which a pattern repeats
  checked_shared(data, bytes_of(map), alignment, name, where);
  return shared_address(data, where);
}

}  // namespace

void check_map(const cuda::TensorMap& map, const char* name, Location where) {
  if (map.mark != kTensorMapMark) {
    fail(std::string(name) + ": a map that tensor_map() did not make", where);
  }
}

void copy_box(void* to, const cuda::TensorMap& map, uint64_t* barrier, int c, int x, int y, int b,
              Location where) {
  const uint32_t address = checked_box(to, map, "copy_box", where);
  const int bytes = bytes_of(map);
  begin_copy(barrier, bytes, where);
  std::memset(shared_memory() + address, 0xff, bytes);
  std::memset(asynchronous_view() + address, 0xff, bytes);
  asynchronously(
      "copy_box",
      [=] {
        for_each_piece(address, map, {c, x, y, b}, [](uint32_t piece, unsigned char** channels) {
          for (int i = 0; i < 8; ++i) {
            uint16_t number = 0;
            if (channels[i] != nullptr) std::memcpy(&number, channels[i], 2);
            std::memcpy(shared_memory() + piece + 2 * i, &number, 2);
          }
          std::memcpy(asynchronous_view() + piece, shared_memory() + piece, 16);
        });
        end_copy(barrier, bytes, where);
      },
      where);
}

void copy_bytes(void* to, const void* from, int bytes, uint64_t* barrier, Location where) {
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    fail("copy_bytes: " + std::to_string(bytes) + " bytes, from an address that is " +
             std::to_string(reinterpret_cast<uintptr_t>(from) % 16) + " beyond a multiple of 16",
         where);
  }
  checked_shared(to, bytes, 16, "copy_bytes", where);
  const uint32_t address = shared_address(to, where);
  begin_copy(barrier, bytes, where);
  std::memset(shared_memory() + address, 0xff, bytes);
  std::memset(asynchronous_view() + address, 0xff, bytes);
  asynchronously(
      "copy_bytes",
      [=] {
        std::memcpy(shared_memory() + address, from, bytes);
        std::memcpy(asynchronous_view() + address, from, bytes);
        end_copy(barrier, bytes, where);
      },
      where);
}

void store_box(const cuda::TensorMap& map, const void* from, int c, int x, int y, int b,
               Location where) {
  const uint32_t address = checked_box(from, map, "store_box", where);
  of_thread<Stores>().open.push_back({map, address, {c, x, y, b}});
}

void commit_stores(Location where) {
  Stores& stores = of_thread<Stores>();
  for (const Box& box : stores.open) {
    stores.under_way += 1;
    asynchronously(
        "store_box",
        [box, &stores] {
          const auto store = [](uint32_t piece, unsigned char** channels) {
            for (int i = 0; i < 8; ++i) {
              if (channels[i] == nullptr) continue;
              std::memcpy(channels[i], asynchronous_view() + piece + 2 * i, 2);
            }
          };
          for_each_piece(box.address, box.map, box.begin, store);
          stores.under_way -= 1;
          state_changed();
        },
        where);
  }
  stores.open.clear();
}

void wait_stores_read(Location where) {
  const Stores& stores = of_thread<Stores>();
  block_until([&] { return stores.under_way == 0; }, "its stores to be read", where);
}

}  // namespace diffit::emulation
