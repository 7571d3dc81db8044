// Rows of a packed tensor gathered as the products read them, and results scattered back.
//
// Tokens lie `stride` numbers apart in a tensor; a head takes `width` of each. Rows and columns of
// working memory are floats, or pairs of bfloat16 numbers adjacent in the direction that a product
// sums over; what pads them is zero.
#pragma once

#include "cpu/product.h"

namespace diffit::DIFFIT_ISA {

constexpr int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// How many elements hold n numbers.
template <class Elements>
constexpr int64_t elements(int64_t n) {
  return (n + Elements::kNumbers - 1) / Elements::kNumbers;
}

// One head's part of a window's tokens.
template <class Number>
struct Tokens {
  Number* base;           // of the window's first token
  const int64_t* offset;  // of its tokens, in tokens
  int64_t stride;         // from token to token, in numbers
  int64_t width;          // head_dim

  Number* row(int64_t token) const { return base + offset[token] * stride; }
};

// Asks for a head's tokens before they are needed, a few at a time between products: heads lie a
// stride apart, which no processor foresees, and all at once would wait for memory as well.
template <class Number>
class Prefetch {
 public:
  // The tokens of `parts` tensors, in `steps` calls of step().
  Prefetch(const Tokens<const Number>* tensors, int64_t parts, int64_t tokens, int64_t steps)
      : tensor_(tensors),
        end_(tensors + parts),
        tokens_(tokens),
        each_(parts * tokens / steps + 1) {}

  void step() {
    constexpr uintptr_t kLine = 64;
    for (int64_t left = each_; left > 0 && tensor_ < end_;) {
      const int64_t stop = std::min(tokens_, token_ + left);
      left -= stop - token_;
      for (; token_ < stop; ++token_) {
        const auto from = reinterpret_cast<uintptr_t>(tensor_->row(token_));
        const uintptr_t end = from + tensor_->width * sizeof(Number);
        for (uintptr_t line = from / kLine * kLine; line < end; line += kLine) {
          __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);
        }
      }
      if (token_ == tokens_) {
        token_ = 0;
        ++tensor_;
      }
    }
  }

 private:
  const Tokens<const Number>*tensor_, *end_;
  int64_t tokens_, each_, token_ = 0;
};

// rows (count, row) = change(token, channel, lanes) for each vector of some tokens; the columns
// behind `width` are zero.
template <class Number, class Change>
DIFFIT_INLINE void gather_with(Tokens<const Number> tokens, int64_t first, int64_t count,
                               float* rows, int64_t row, Change change) {
  const int64_t whole = tokens.width / kLanes * kLanes, rest = tokens.width - whole;
  for (int64_t i = 0; i < count; ++i) {
    const Number* from = tokens.row(first + i);
    float* to = rows + i * row;
    for (int64_t c = 0; c < whole; c += kLanes) {
      store(to + c, change(load(from + c), c, static_cast<int>(kLanes)));
    }
    if (rest) {
      const int n = static_cast<int>(rest);
      store(to + whole, change(load(from + whole, n), whole, n));
    }
  }
}

template <class Number>
inline void gather(Tokens<const Number> tokens, int64_t first, int64_t count, float* rows,
                   int64_t row) {
  gather_with(tokens, first, count, rows, row, [](Vec value, int64_t, int) { return value; });
}

// rows = (tokens + shift) · factor; shift may be null.
template <class Number>
inline void gather(Tokens<const Number> tokens, int64_t first, int64_t count, const float* shift,
                   float factor, float* rows, int64_t row) {
  if (!shift) {
    gather_with(tokens, first, count, rows, row,
                [=](Vec value, int64_t, int) { return value * factor; });
    return;
  }
  gather_with(tokens, first, count, rows, row, [=](Vec value, int64_t c, int n) {
    return (value + (n == kLanes ? load(shift + c) : load(shift + c, n))) * factor;
  });
}

// floats (count, row) -> elements (width, lanes), adjacent in the width; lanes behind `count` are
// zero.
template <class Elements>
inline void to_columns(const float* rows, int64_t row, int64_t count, int64_t width, float* columns,
                       int64_t lanes) {
  for (int64_t lane = 0; lane < lanes; lane += kLanes) {
    for (int64_t c = 0; c < width; c += kLanes) {
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        square[i] = lane + i < count ? load(rows + (lane + i) * row + c) : Vec{};
      }
      transpose(square);
      const int64_t n = elements<Elements>(std::min<int64_t>(kLanes, width - c));
      float* to = columns + c / Elements::kNumbers * lanes + lane;
      for (int64_t i = 0; i < n; ++i) {
        store(to + i * lanes, Elements::join(square + i * Elements::kNumbers));
      }
    }
  }
}

// floats (count, row) -> elements (count, row), adjacent in the count; may be in place.
template <class Elements>
inline void join_rows(const float* rows, int64_t row, int64_t count, float* joined) {
  if (Elements::kNumbers == 1 && rows == joined) return;
  for (int64_t i = 0; i < elements<Elements>(count); ++i) {
    for (int64_t c = 0; c < row; c += kLanes) {
      Vec numbers[Elements::kNumbers];
      for (int k = 0; k < Elements::kNumbers; ++k) {
        const int64_t from = i * Elements::kNumbers + k;
        numbers[k] = from < count ? load(rows + from * row + c) : Vec{};
      }
      store(joined + i * row + c, Elements::join(numbers));
    }
  }
}

// tokens = columns (width, lanes) transposed · factor + shift; sum += their sum before the shift.
template <class Number>
inline void scatter_columns(const float* columns, int64_t lanes, const float* lane_factor,
                            float factor, const float* shift, Tokens<Number> tokens, int64_t first,
                            int64_t count, float* sum) {
  const int64_t width = tokens.width;
  for (int64_t lane = 0; lane < count; lane += kLanes) {
    const Vec by = lane_factor ? load(lane_factor + lane) : fill(factor);
    const int64_t rows = std::min<int64_t>(kLanes, count - lane);
    for (int64_t c = 0; c < width; c += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, width - c);
      Vec square[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        square[i] = i < n ? load(columns + (c + i) * lanes + lane) * by : Vec{};
      }
      transpose(square);
      const Vec add = shift ? load(shift + c, n) : Vec{};
      Vec total{};
      for (int64_t i = 0; i < rows; ++i) {
        Number* to = tokens.row(first + lane + i) + c;
        total += square[i];
        n == kLanes ? store(to, square[i] + add) : store(to, square[i] + add, n);
      }
      if (sum) store(sum + c, load(sum + c) + total);
    }
  }
}

// tokens = rows (count, row)
template <class Number>
inline void scatter_rows(const float* rows, int64_t row, Tokens<Number> tokens, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    Number* to = tokens.row(i);
    for (int64_t c = 0; c < tokens.width; c += kLanes) {
      const int64_t n = tokens.width - c;
      const Vec value = load(rows + i * row + c);
      n >= kLanes ? store(to + c, value) : store(to + c, value, n);
    }
  }
}

// The left side of products: a head's keys or values, to be summed over channels or over tokens.
template <class Elements>
struct LeftSide;

template <>
struct LeftSide<Floats> {
  static int64_t size(int64_t tokens, int64_t width) {
    return Scratch::round(tokens * padded(width));
  }
  LeftSide(Scratch& scratch, int64_t tokens, int64_t width)
      : row(padded(width)), rows(scratch.take(tokens * row)) {}

  template <class Number>
  void gather(Tokens<const Number> tokens, int64_t count) {
    DIFFIT_ISA::gather(tokens, 0, count, rows, row);
  }
  Left over_channels(int64_t token) const { return {rows + token * row, row, 1}; }
  Left over_tokens(int64_t token) const { return {rows + token * row, 1, row}; }

  int64_t row;
  float* rows;
};

#if defined(DIFFIT_BFLOAT16_DOT)
template <>
struct LeftSide<BFloat16Pairs> {
  static int64_t size(int64_t tokens, int64_t width) {
    return Scratch::round(tokens * padded(width) / 2) +
           Scratch::round((tokens + 1) / 2 * padded(width));
  }
  LeftSide(Scratch& scratch, int64_t tokens, int64_t width)
      : row(padded(width)),
        by_channel(scratch.take(tokens * row / 2)),
        by_token(scratch.take((tokens + 1) / 2 * row)) {}

  void gather(Tokens<const BFloat16> tokens, int64_t count) {
    uint16_t* channels = reinterpret_cast<uint16_t*>(by_channel);
    for (int64_t i = 0; i < count; ++i) {
      const BFloat16* from = tokens.row(i);
      for (int64_t c = 0; c < row; c += kLanes) {
        const int64_t n = std::min<int64_t>(kLanes, tokens.width - c);
        const __m256i part = _mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), from + c);
        std::memcpy(channels + i * row + c, &part, sizeof part);
      }
    }
    for (int64_t i = 0; i < count; i += 2) {
      for (int64_t c = 0; c < row; c += kLanes) {
        Shorts even, odd{};
        std::memcpy(&even, channels + i * row + c, sizeof even);
        if (i + 1 < count) std::memcpy(&odd, channels + (i + 1) * row + c, sizeof odd);
        const Words both =
            __builtin_convertvector(even, Words) | (__builtin_convertvector(odd, Words) << 16);
        store(by_token + i / 2 * row + c, bits_as<Vec>(both));
      }
    }
  }
  Left over_channels(int64_t token) const { return {by_channel + token * row / 2, row / 2, 1}; }
  Left over_tokens(int64_t token) const { return {by_token + token / 2 * row, 1, row}; }

  int64_t row;
  float* by_channel;  // (tokens, row / 2)
  float* by_token;    // (tokens / 2, row)
};
#endif

}  // namespace diffit::DIFFIT_ISA
