// Products of a warpgroup: matrices in shared memory by their descriptors, D and A in registers,
// and when all of it is read and written.
#include "cuda/ptx/wgmma.cuh"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <vector>

#include "cuda/ptx/barrier.cuh"

namespace diffit::emulation {
namespace {

constexpr uint32_t kPoison = 0x7fda7a11;  // NaN
using Eight = float __attribute__((vector_size(32)));

// A descriptor's fields, in bytes.
struct Matrix {
  uint32_t start, leading, stride;
  int swizzle;  // bytes of a row: 0, 32, 64 or 128
};

Matrix decoded(uint64_t bits, const char* name, Location where) {
  const auto field = [&](int first) { return uint32_t(bits >> first & 0x3fff) << 4; };
  const int rows[4] = {0, 128, 64, 32};
  const Matrix matrix{field(0), field(16), field(32), rows[bits >> 62]};
  if ((bits & 0x3fffc000c000c000u) != 0) {
    fail(std::string("the descriptor of ") + name + " has bits that are not of a field", where);
  }
  // Its base offset, which must be 0 for that, tells where in the pattern of a swizzle it starts.
  if (matrix.swizzle != 0 && matrix.start / matrix.swizzle % 8 != 0) {
    fail(std::string(name) + " at byte " + std::to_string(matrix.start) +
             " of shared memory does not start in a first row of eight that its swizzle permutes",
         where);
  }
  return matrix;
}

// Where the number of row or column `mn` and of `k` (below 16) lies: the PTX ISA's canonical
// layouts, of 2-byte numbers.
uint32_t place(const Matrix& m, bool mn_major, int mn, int k) {
  uint32_t address = m.start;
  if (m.swizzle == 0) {
    address += mn / 8 * m.stride + k / 8 * m.leading;
    return address + (mn_major ? mn % 8 * 2 + k % 8 * 16 : mn % 8 * 16 + k % 8 * 2);
  }
  if (mn_major) {
    const int row = m.swizzle / 2;
    address += mn / row * m.leading + mn % row * 2 + k / 8 * m.stride + k % 8 * m.swizzle;
  } else {
    address += mn / 8 * m.stride + mn % 8 * m.swizzle + k * 2;
  }
  return address ^ (address >> 7 & (m.swizzle / 16 - 1)) << 4;
}

// The part of a matrix that starts at `first`, as numbers [k][mn].
void read_matrix(float* to, const float* numbers, uint64_t bits, bool mn_major, int first,
                 int count, const char* name, Location where) {
  const Matrix matrix = decoded(bits, name, where);
  const int in_row = matrix.swizzle == 0 ? 0 : matrix.start % matrix.swizzle;
  if (in_row != 0 && in_row + (mn_major ? 2 * count : 32) > matrix.swizzle) {
    fail(std::string(name) + " goes beyond the end of its rows", where);
  }
  const unsigned char* view = asynchronous_view();
  for (int mn = 0; mn < count; ++mn) {
    for (int k = 0; k < 16; ++k) {
      const uint32_t address = place(matrix, mn_major, first + mn, k);
      if (int64_t{address} + 2 > shared_bytes()) {
        fail(std::string(name) + " has a number at byte " + std::to_string(address) +
                 " of shared memory, which has " + std::to_string(shared_bytes()),
             where);
      }
      uint16_t number;
      std::memcpy(&number, view + address, 2);
      to[k * count + mn] = numbers[number];
    }
  }
}

// A product that a thread has asked for.
struct Asked {
  Product product;
  Location where;
  int64_t index;  // among those of the warpgroup
};

// What a thread's D is, or will be.
struct Sums {
  float* d;
  int under_way;  // products
  std::vector<float> values;
};

struct OfThread {
  bool fenced = false;
  std::vector<Asked> open;
  std::deque<std::vector<Asked>> groups;
  std::deque<Sums> sums;
};

// What the warps of a warpgroup have asked for: the first to do so writes it down.
struct Warpgroup {
  std::deque<std::pair<Product, Location>> log;
  int64_t first = 0;  // index of the log's first
  int64_t asked[4] = {};
};

struct Warpgroups {
  std::map<int, Warpgroup> at;
};

Warpgroup& own_warpgroup(Location where) {
  const int warpgroup = warp_index() / 4;
  if ((warpgroup + 1) * 128 > int(blockDim.x)) {
    fail("wgmma by a part of a warpgroup: the block has " + std::to_string(blockDim.x) + " threads",
         where);
  }
  return of_block<Warpgroups>().at[warpgroup];
}

bool early() {
  const char* when = std::getenv("DIFFIT_EMULATION_WGMMA");
  if (when == nullptr || std::strcmp(when, "late") == 0) return false;
  if (std::strcmp(when, "early") == 0) return true;
  throw std::runtime_error(std::string("DIFFIT_EMULATION_WGMMA is early or late, not ") + when);
}

bool same(const std::pair<Product, Location>& one, const Product& other, Location where) {
  const Product& a = one.first;
  return a.numbers == other.numbers && a.n == other.n && a.n_major == other.n_major &&
         a.add == other.add && a.a == other.a && a.b == other.b &&
         (a.a_registers == nullptr) == (other.a_registers == nullptr) &&
         one.second.line() == where.line() && one.second.column() == where.column();
}

Sums* find_sums(OfThread& own, const Product& product, Location where) {
  for (Sums& sums : own.sums) {
    const int count = sums.values.size();
    if (sums.d == product.d && count == product.n / 2) return &sums;
    if (sums.d < product.d + product.n / 2 && product.d < sums.d + count) {
      fail("D overlaps the D of another product under way", where);
    }
  }
  return nullptr;
}

// The warp's 16 rows of a product, whose D of each lane is at d[lane].
void execute(const Product* const (&lanes)[32], float* const (&d)[32], int warp, Location where) {
  const Product& product = *lanes[0];
  const int n = product.n;
  float a[16 * 16];
  std::vector<Eight> b(16 * n / 8), sums(16 * n / 8);
  if (product.a_registers == nullptr) {
    read_matrix(a, product.numbers, product.a, false, warp % 4 * 16, 16, "A", where);
  } else {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 8; ++i) {
        const uint32_t both = lanes[lane]->a_registers[i / 2];
        const int row = lane / 4 + i / 2 % 2 * 8, k = lane % 4 * 2 + i % 2 + i / 4 * 8;
        a[k * 16 + row] = product.numbers[i % 2 == 0 ? both & 0xffff : both >> 16];
      }
    }
  }
  read_matrix(reinterpret_cast<float*>(b.data()), product.numbers, product.b, product.n_major, 0, n,
              "B", where);
  const auto element = [&](int lane, int i) -> float& {
    const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    return reinterpret_cast<float*>(sums.data())[row * n + column];
  };
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < n / 2; ++i) element(lane, i) = product.add ? d[lane][i] : 0.0f;
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int i = 0; i < n / 8; ++i) sums[row * n / 8 + i] += a[k * 16 + row] * b[k * n / 8 + i];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < n / 2; ++i) d[lane][i] = element(lane, i);
  }
}

bool all_have_asked(const Warpgroup& group, int64_t index) {
  return std::all_of(group.asked, group.asked + 4, [&](int64_t asked) { return asked > index; });
}

// Of a whole warp: the `due` oldest groups of products, into the hidden sums.
template <class Lanes>
void finish(const Lanes& lanes, int due, int warp) {
  for (int group = 0; group < due; ++group) {
    for (size_t i = 0; i < lanes[0].own->groups[group].size(); ++i) {
      const Product* products[32];
      float* d[32];
      for (int lane = 0; lane < 32; ++lane) {
        Asked& asked = lanes[lane].own->groups[group][i];
        Sums& sums = *find_sums(*lanes[lane].own, asked.product, asked.where);
        products[lane] = &asked.product;
        d[lane] = sums.values.data();
        sums.under_way -= 1;
      }
      execute(products, d, warp, lanes[0].own->groups[group][i].where);
    }
  }
}

}  // namespace

uint64_t describe_matrix(const void* data, int leading, int stride, int swizzle, Location where) {
  const uint32_t start = shared_address(data, where);
  const auto field = [&](const char* name, int64_t bytes) {
    if (bytes % 16 != 0 || bytes < 0 || bytes >= 1 << 18) {
      fail("matrix: " + std::string(name) + " of " + std::to_string(bytes) +
               " bytes is not a multiple of 16 below 2^18",
           where);
    }
    return uint64_t(bytes) >> 4;
  };
  return field("an address", start) | field("a leading offset", leading) << 16 |
         field("a stride", stride) << 32 | uint64_t(swizzle) << 62;
}

uint64_t moved(uint64_t matrix, int bytes, Location where) {
  const int64_t start = int64_t(matrix & 0x3fff) + bytes / 16;
  if (bytes % 16 != 0 || start < 0 || start > 0x3fff) {
    fail("moved: by " + std::to_string(bytes) + " bytes to byte " + std::to_string(start * 16) +
             "; it must be a multiple of 16 below 2^18",
         where);
  }
  return (matrix & ~uint64_t{0x3fff}) | uint64_t(start);
}

void fence_products(Location where) {
  own_warpgroup(where);
  sync_warp(where);
  of_thread<OfThread>().fenced = true;
}

void multiply(const Product& product, Location where) {
  Warpgroup& group = own_warpgroup(where);
  OfThread& own = of_thread<OfThread>();
  if (!own.fenced) {
    fail("wgmma without a wgmma_fence since the kernel began or since the last wgmma_wait", where);
  }
  Sums* sums = find_sums(own, product, where);
  if (sums == nullptr) {
    own.sums.push_back({product.d, 0, std::vector<float>(product.d, product.d + product.n / 2)});
    sums = &own.sums.back();
  }
  sums->under_way += 1;
  std::fill_n(product.d, product.n / 2, std::bit_cast<float>(kPoison));

  struct Payload {
    const Product* product;
    float* d;
    int64_t index;
  } payload{&product, sums->values.data(), 0};
  warp_collective(
      "wgmma", payload,
      [&](const Payloads<Payload>& lanes) {
        int64_t& asked = group.asked[warp_index() % 4];
        if (asked == group.first + int64_t(group.log.size())) group.log.push_back({product, where});
        const auto& first = group.log[asked - group.first];
        for (int lane = 0; lane < 32; ++lane) {
          if (!same(first, *lanes[lane].product, where)) {
            fail("lane " + std::to_string(lane) +
                     " asks for another wgmma than the warpgroup's first warp to come here did "
                     "(at line " +
                     std::to_string(first.second.line()) + ")",
                 where);
          }
          lanes[lane].index = asked;
        }
        asked += 1;
        while (!group.log.empty() && all_have_asked(group, group.first)) {
          group.log.pop_front();
          group.first += 1;
        }
        state_changed();
        if (early()) {
          const Product* products[32];
          float* d[32];
          for (int lane = 0; lane < 32; ++lane) {
            products[lane] = lanes[lane].product;
            d[lane] = lanes[lane].d;
          }
          execute(products, d, warp_index(), where);
        }
      },
      where);
  if (early()) {
    std::copy(sums->values.begin(), sums->values.end(), product.d);
    own.sums.clear();
  }
  own.open.push_back({product, where, payload.index});
}

void commit_products(Location where) {
  own_warpgroup(where);
  sync_warp(where);
  OfThread& own = of_thread<OfThread>();
  own.groups.push_back(std::move(own.open));
  own.open.clear();
}

void wait_for_products(int pending, Location where) {
  const Warpgroup& group = own_warpgroup(where);
  OfThread& own = of_thread<OfThread>();
  const int due = std::max(0, int(own.groups.size()) - pending);
  for (int i = 0; i < due; ++i) {
    if (own.groups[i].empty()) continue;
    const int64_t last = own.groups[i].back().index;
    block_until([&] { return all_have_asked(group, last); },
                "all warps of the warpgroup to ask for the same products", where);
  }
  if (due > 0) {
    bool done = false;
    struct Payload {
      OfThread* own;
      bool* done;
    } payload{&own, &done};
    warp_collective(
        "wgmma_wait", payload,
        [&](const Payloads<Payload>& lanes) {
          std::vector<Payload> all;
          for (int lane = 0; lane < 32; ++lane) all.push_back(lanes[lane]);
          asynchronously(
              "wgmma",
              [all, due, warp = warp_index()] {
                if (!early()) finish(all, due, warp);
                for (const Payload& payload : all) *payload.done = true;
                state_changed();
              },
              where);
        },
        where);
    block_until([&] { return done; }, "products to be done", where);
  }
  own.groups.erase(own.groups.begin(), own.groups.begin() + due);
  own.fenced = false;
  for (auto sums = own.sums.begin(); sums != own.sums.end();) {
    if (sums->under_way > 0) {
      ++sums;
      continue;
    }
    for (size_t i = 0; i < sums->values.size(); ++i) {
      if (std::bit_cast<uint32_t>(sums->d[i]) != kPoison) {
        fail("D of a product was written while it was under way", where);
      }
      sums->d[i] = sums->values[i];
    }
    sums = own.sums.erase(sums);
  }
}

}  // namespace diffit::emulation
