// Rows of numbers of any storage type, a vector at a time.
#pragma once

#include "cpu/simd.h"

// Of a lambda that is the body of a loop: compilers would call those with two kinds of lanes.
#define DIFFIT_BODY __attribute__((always_inline))

namespace diffit::DIFFIT_ISA {

// How many lanes of a vector count: all, or the first few where a row ends.
struct Whole {};
struct First {
  int lanes;
};

template <class Number>
DIFFIT_INLINE Vec load(const Number* from, Whole) {
  return load(from);
}
template <class Number>
DIFFIT_INLINE Vec load(const Number* from, First first) {
  return load(from, first.lanes);
}
template <class Number>
DIFFIT_INLINE void store(Number* to, Vec value, Whole) {
  store(to, value);
}
template <class Number>
DIFFIT_INLINE void store(Number* to, Vec value, First first) {
  store(to, value, first.lanes);
}
template <class Number>
DIFFIT_INLINE void add_to(Number* to, Vec value, Whole) {
  store(to, load(to) + value);
}
template <class Number>
DIFFIT_INLINE void add_to(Number* to, Vec value, First first) {
  store(to, load(to, first.lanes) + value, first.lanes);
}

template <int... I>
DIFFIT_INLINE Ints lane_numbers(std::integer_sequence<int, I...>) {
  return Ints{I...};
}

// The lanes that count, and zeros: for sums of what is not zero behind a row's end.
DIFFIT_INLINE Vec keep(Vec value, Whole) { return value; }
DIFFIT_INLINE Vec keep(Vec value, First first) {
  return lane_numbers(AllLanes()) < first.lanes ? value : Vec{};
}

// What is left of a value when it is stored as Number.
template <class Number>
DIFFIT_INLINE Vec rounded(Vec value) {
  return widen(narrow(value, Number{}), Number{});
}
template <>
DIFFIT_INLINE Vec rounded<float>(Vec value) {
  return value;
}

// body(at, lanes, way) for each vector of a row; `way` counts the independent sums a caller may
// keep, so that no addition has to wait for the one before it.
template <int kWays, class Body>
DIFFIT_INLINE void by_vector(int64_t size, Body body) {
  int64_t at = 0;
  for (; at + kWays * kLanes <= size; at += kWays * kLanes) {
#pragma GCC unroll 8
    for (int way = 0; way < kWays; ++way) body(at + way * kLanes, Whole{}, way);
  }
  for (; at + kLanes <= size; at += kLanes) body(at, Whole{}, 0);
  if (at < size) body(at, First{static_cast<int>(size - at)}, 0);
}

template <int kWays>
DIFFIT_INLINE float sum(const Vec (&parts)[kWays]) {
  Vec total = parts[0];
#pragma GCC unroll 8
  for (int way = 1; way < kWays; ++way) total += parts[way];
  return sum(total);
}

// body(float{}), body(BFloat16{}) or body(Half{}).
template <class Body>
DIFFIT_INLINE void with_number(Number number, Body body) {
  switch (number) {
    case Number::kFloat32:
      return body(float{});
    case Number::kBFloat16:
      return body(BFloat16{});
    case Number::kFloat16:
      return body(Half{});
  }
}

// `size` numbers from number `first` on, as floats: where they lie if they are, else in `room`.
inline const float* as_floats(const void* data, Number number, int64_t first, int64_t size,
                              float* room) {
  if (number == Number::kFloat32) return static_cast<const float*>(data) + first;
  with_number(number, [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(data) + first;
    by_vector<1>(size, [&](int64_t at, auto lanes, int)
                           DIFFIT_BODY { store(room + at, load(from + at, lanes), lanes); });
  });
  return room;
}

// Floats to `size` numbers from number `first` on.
inline void from_floats(const float* floats, int64_t size, void* data, Number number,
                        int64_t first) {
  with_number(number, [&](auto type) {
    auto* to = static_cast<decltype(type)*>(data) + first;
    by_vector<1>(size, [&](int64_t at, auto lanes, int)
                           DIFFIT_BODY { store(to + at, load(floats + at, lanes), lanes); });
  });
}

template <class Lanes>
DIFFIT_INLINE Vec load_as(const void* data, Number number, int64_t at, Lanes lanes) {
  Vec value{};
  with_number(number, [&](auto type) {
    value = load(static_cast<const decltype(type)*>(data) + at, lanes);
  });
  return value;
}

template <class Lanes>
DIFFIT_INLINE void store_as(void* data, Number number, int64_t at, Vec value, Lanes lanes) {
  with_number(number,
              [&](auto type) { store(static_cast<decltype(type)*>(data) + at, value, lanes); });
}

inline void fill_row(float* row, int64_t size, float value) {
  by_vector<1>(
      size, [&](int64_t at, auto lanes, int) DIFFIT_BODY { store(row + at, fill(value), lanes); });
}

// The sum down `count` rows, 32 of them at a time, so that no sum is over many terms.
template <class Lanes>
DIFFIT_INLINE Vec sum_down(const float* rows, int64_t count, int64_t columns, Lanes lanes) {
  Vec total{};
  for (int64_t row = 0; row < count;) {
    const int64_t stop = row + 32 < count ? row + 32 : count;
    Vec part{};
    for (; row < stop; ++row) part += load(rows + row * columns, lanes);
    total += part;
  }
  return total;
}

}  // namespace diffit::DIFFIT_ISA
