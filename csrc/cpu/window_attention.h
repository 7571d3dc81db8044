// Windowed attention with a time token and a position bias.
//
//     out = softmax(scale · (q + q_t) kᵀ + bias) v + v_t
//
// A problem is a window of a sample and a head. Scores are transposed: keys down, queries across
// the lanes, so that a row's statistics need no sums across lanes, keys and values are broadcast
// from where they lie, and no head_dim wastes lanes.
#pragma once

#include "cpu/packing.h"
#include "cpu/windows.h"

namespace diffit::DIFFIT_ISA {

constexpr int64_t kBlockQueries = 2 * kLanes;
constexpr int64_t kBlockKeys = 256;  // scores of a block stay in the nearest cache

// The bias, expanded for blocks of queries: of all heads if they fit, else of one head, else of one
// block at a time.
class Bias {
 public:
  static int64_t size(const WindowAttention& a, int64_t block) {
    return Scratch::round(kept(a, block));
  }
  Bias(Scratch& scratch, const Windows& windows, int64_t block)
      : windows_(windows), block_(block), bias_(scratch.take(kept(windows.call, block))) {
    if (!windows.call.table || !windows.call.by_window()) return;
    for (int64_t head = 0; head < windows.call.heads; ++head) {
      expand_head(head, bias_ + head * windows.call.bias_size());
    }
  }

  // (keys, lanes); null without a table.
  const float* expanded(int64_t head, QueryBlock block) {
    const WindowAttention& a = windows_.call;
    if (!a.table) return nullptr;
    const int64_t within = block.first * windows_.tokens;
    if (a.by_window()) return bias_ + head * a.bias_size() + within;
    if (head_fits(a)) {
      if (head != head_) expand_head(head, bias_);
      return bias_ + within;
    }
    expand_bias(windows_, table(head), block, bias_);
    return bias_;
  }

  static bool head_fits(const WindowAttention& a) { return a.bias_size() <= a.kKeptBias; }

 private:
  static int64_t kept(const WindowAttention& a, int64_t block) {
    if (!a.table) return 0;
    if (a.by_window()) return a.heads * a.bias_size();
    return head_fits(a) ? a.bias_size() : a.tokens() * block;
  }

  const float* table(int64_t head) const {
    return windows_.call.table + head * windows_.table_size;
  }

  void expand_head(int64_t head, float* bias) {
    for (int64_t first = 0; first < windows_.tokens; first += block_) {
      expand_bias(windows_, table(head), query_block(windows_, first, block_),
                  bias + first * windows_.tokens);
    }
    head_ = head;
  }

  const Windows& windows_;
  int64_t block_;
  float* bias_;
  int64_t head_ = -1;
};

// The softmax of queries along the lanes, key block by key block.
template <class Elements>
class Softmax {
 public:
  static int64_t size(int64_t lanes) { return 3 * Scratch::round(lanes); }
  Softmax(Scratch& scratch, int64_t lanes)
      : top_(scratch.take(lanes)), total_(scratch.take(lanes)), inverse_(scratch.take(lanes)) {}

  void start(int64_t lanes) {
    lanes_ = lanes;
    for (int64_t n = 0; n < lanes; n += kLanes) {
      store(top_ + n, fill(-std::numeric_limits<float>::infinity()));
      store(total_ + n, Vec{});
    }
  }

  // scores (keys, lanes) become probabilities, as elements adjacent in the keys, up to the factor
  // that inverse_total() ends with; `sums` (width, lanes), of earlier keys, follow the new maximum.
  void take(float* scores, int64_t keys, float* sums, int64_t width) {
    for (int64_t n = 0; n < lanes_; n += kLanes) {
      const Vec before = load(top_ + n);
      Vec top = before, other = before;
      for (int64_t j = 0; j + 1 < keys; j += 2) {
        top = max(top, load(scores + j * lanes_ + n));
        other = max(other, load(scores + (j + 1) * lanes_ + n));
      }
      if (keys % 2) top = max(top, load(scores + (keys - 1) * lanes_ + n));
      top = max(top, other);
      // Where every score so far is -inf, subtract 0: their powers are 0, not NaN.
      const Vec shift = top == -std::numeric_limits<float>::infinity() ? Vec{} : top;
      const Vec fade = exp(before - shift);
      Vec total = load(total_ + n) * fade;
      for (int64_t first = 0; first < keys; first += kTerms) {
        Vec part{};  // as long a sum as a product's
        for (int64_t j = first; j < std::min(keys, first + kTerms); j += Elements::kNumbers) {
          Vec powers[Elements::kNumbers];
          for (int k = 0; k < Elements::kNumbers; ++k) {
            powers[k] = j + k < keys ? exp(load(scores + (j + k) * lanes_ + n) - shift) : Vec{};
            part += powers[k];
          }
          store(scores + j / Elements::kNumbers * lanes_ + n, Elements::join(powers));
        }
        total += part;
      }
      store(top_ + n, top);
      store(total_ + n, total);
      if (sums) {
        for (int64_t c = 0; c < width; ++c) {
          store(sums + c * lanes_ + n, load(sums + c * lanes_ + n) * fade);
        }
      }
    }
  }

  const float* inverse_total() {
    for (int64_t n = 0; n < lanes_; n += kLanes) store(inverse_ + n, 1.0f / load(total_ + n));
    return inverse_;
  }

 private:
  float *top_, *total_, *inverse_;
  int64_t lanes_ = 0;
};

// One of the `parts` parts of a packed tensor (B, H, W, parts · C), as a problem's tokens.
template <class Number, class Pointer>
inline Tokens<Number> part_of(const Windows& windows, Pointer* packed, int64_t parts, int64_t part,
                              const Problem& problem) {
  const int64_t stride = parts * windows.channels, width = windows.call.head_dim;
  return {static_cast<Number*>(packed) + problem.first_token * stride + part * windows.channels +
              problem.head * width,
          windows.offset.data(), stride, width};
}

// The time token's q part (0) or v part (1) for a problem; null without one.
inline const float* time_part(const Windows& windows, int64_t part, const Problem& problem) {
  if (!windows.call.temb) return nullptr;
  return windows.call.temb + (2 * problem.sample + part) * windows.channels +
         problem.head * windows.call.head_dim;
}

template <class Number, class Elements>
inline void forward_range(const WindowAttention& a, int64_t begin, int64_t end) {
  const Windows windows(a);
  const int64_t tokens = windows.tokens, width = a.head_dim, row = padded(width);
  const int64_t block = std::min(kBlockQueries, padded(tokens));
  const int64_t keys = std::min(kBlockKeys, tokens);
  const int64_t parts = (tokens + kTaskQueries - 1) / kTaskQueries;
  Scratch scratch(2 * LeftSide<Elements>::size(tokens, width) + Bias::size(a, block) +
                  Softmax<Elements>::size(block) + 2 * Scratch::round(row * block) +
                  Scratch::round(block * row) + Scratch::round(keys * block));
  LeftSide<Elements> k(scratch, tokens, width), v(scratch, tokens, width);
  Bias bias(scratch, windows, block);
  Softmax<Elements> softmax(scratch, block);
  float* rows = scratch.take(block * row);
  float* q = scratch.take(row * block);
  float* sums = scratch.take(row * block);
  float* scores = scratch.take(keys * block);

  const auto problem_of = [&](int64_t task) {
    const int64_t problem = task / parts;
    const int64_t size = a.by_window() ? a.heads : windows.of_head, outer = problem / size;
    const int64_t inner = problem - outer * size;
    return a.by_window() ? Problem(windows, inner, outer) : Problem(windows, outer, inner);
  };

  Problem problem = problem_of(begin);
  for (int64_t task = begin; task < end; ++task) {
    const Problem next = problem_of(std::min(task + 1, end - 1));
    const auto q_tokens = part_of<const Number>(windows, a.qkv, 3, 0, problem);
    const auto out = part_of<Number>(windows, a.out, 1, 0, problem);
    const float* q_time = time_part(windows, 0, problem);
    const float* v_time = time_part(windows, 1, problem);
    const int64_t part = task % parts;
    const int64_t begin_query = part * kTaskQueries;
    const int64_t end_query = std::min(tokens, begin_query + kTaskQueries);
    if (part == 0 || task == begin) {
      k.gather(part_of<const Number>(windows, a.qkv, 3, 1, problem), tokens);
      v.gather(part_of<const Number>(windows, a.qkv, 3, 2, problem), tokens);
    }
    const Tokens<const Number> ahead[] = {part_of<const Number>(windows, a.qkv, 3, 0, next),
                                          part_of<const Number>(windows, a.qkv, 3, 1, next),
                                          part_of<const Number>(windows, a.qkv, 3, 2, next),
                                          part_of<const Number>(windows, a.out, 1, 0, next)};
    const int64_t steps = 3 * ((end_query - begin_query + block - 1) / block);
    Prefetch<Number> prefetch(ahead, parts == 1 ? 4 : 0, tokens, steps);
    for (int64_t first = begin_query; first < end_query; first += block) {
      const QueryBlock queries = query_block(windows, first, block);
      const int64_t lanes = queries.lanes;
      gather(q_tokens, first, queries.count, q_time, a.scale, rows, row);
      to_columns<Elements>(rows, row, queries.count, width, q, lanes);
      prefetch.step();
      const float* added = bias.expanded(problem.head, queries);
      softmax.start(lanes);
      for (int64_t j = 0; j < tokens; j += keys) {
        const int64_t count = std::min(keys, tokens - j);
        wide_product<Elements>(count, lanes, k.over_channels(j), {q, lanes},
                               elements<Elements>(width),
                               {added ? added + j * lanes : nullptr, lanes}, scores, lanes);
        prefetch.step();
        softmax.take(scores, count, j ? sums : nullptr, width);
        prefetch.step();
        wide_product<Elements>(width, lanes, v.over_tokens(j), {scores, lanes},
                               elements<Elements>(count), {j ? sums : nullptr, lanes}, sums, lanes);
      }
      scatter_columns(sums, lanes, softmax.inverse_total(), 1.0f, v_time, out, first, queries.count,
                      nullptr);
    }
    problem = next;
  }
}

}  // namespace diffit::DIFFIT_ISA
