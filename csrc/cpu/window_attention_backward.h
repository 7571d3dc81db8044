// The gradients of windowed attention. With P the probabilities and dO the gradient of `out`:
//
//     dv = Pᵀ dO    dP = dO vᵀ    dS = P ∘ (dP - rowsum(P ∘ dP))    dbias = sum of dS over windows
//     dq = scale · dS k    dk = scale · dSᵀ (q + q_t)    dq_t = sum of dq    dv_t = sum of dO
//
// A block of queries meets all keys of its window at once, so nothing of the forward is kept: the
// maxima, the sums and the rows of P ∘ dP are at hand. A task is a group of windows, for one
// head or for all; it sums dbias by pairs of tokens and folds that into its own copy of the table.
#pragma once

#include "cpu/rows.h"
#include "cpu/window_attention.h"

namespace diffit::DIFFIT_ISA {

constexpr int64_t kBackwardQueries = 2 * kLanes;

// A block of queries, or of rows of dO, as both of its products read it.
template <class Elements>
class RightSide {
 public:
  static int64_t size(int64_t lanes, int64_t row) {
    return 2 * Scratch::round(lanes * row) + Scratch::round(row * lanes);
  }
  RightSide(Scratch& scratch, int64_t lanes, int64_t row)
      : row_(row),
        rows_(scratch.take(lanes * row)),
        joined_(Elements::kNumbers == 1 ? rows_ : scratch.take(lanes * row)),
        columns_(scratch.take(row * lanes)) {}

  template <class Number>
  void gather(Tokens<const Number> tokens, QueryBlock block, const float* shift, float factor) {
    lanes_ = block.lanes;
    DIFFIT_ISA::gather(tokens, block.first, block.count, shift, factor, rows_, row_);
    std::memset(rows_ + block.count * row_, 0, (block.lanes - block.count) * row_ * sizeof(float));
    to_columns<Elements>(rows_, row_, block.count, tokens.width, columns_, lanes_);
    join_rows<Elements>(rows_, row_, lanes_, joined_);
  }

  // += the sum of the rows.
  void add_rows_to(float* sum) const {
    for (int64_t c = 0; c < row_; c += kLanes) {
      Vec total{};
      for (int64_t i = 0; i < lanes_; ++i) total += load(rows_ + i * row_ + c);
      store(sum + c, load(sum + c) + total);
    }
  }

  Rows over_channels() const { return {columns_, lanes_}; }  // (width, lanes)
  Rows over_tokens() const { return {joined_, row_}; }       // (lanes, row)
  int64_t steps() const { return elements<Elements>(lanes_); }

 private:
  int64_t row_, lanes_ = 0;
  float *rows_, *joined_, *columns_;
};

// P and dS of a block of queries against all keys.
template <class Elements>
class Scores {
 public:
  static int64_t size(int64_t keys, int64_t lanes) {
    const int64_t all = Scratch::round(keys * lanes);
    return Elements::kNumbers == 1 ? 2 * all : 4 * all;
  }
  Scores(Scratch& scratch, int64_t keys, int64_t lanes)
      : keys_(keys),
        scores(scratch.take(keys * lanes)),
        dprobs(scratch.take(keys * lanes)),
        p_left_(Elements::kNumbers == 1 ? scores : scratch.take(keys * lanes)),
        ds_left_(Elements::kNumbers == 1 ? dprobs : scratch.take(keys * lanes)) {}

  // From scores and dP (keys, lanes); dbias += dS unless null. Lanes that pad are zero: what is not
  // finite in a key or a value would be NaN there, and reach the sums over queries.
  void take(QueryBlock block, float* dbias) {
    const int64_t lanes = lanes_ = block.lanes;
    for (int64_t n = 0; n < lanes; n += kLanes) {
      Vec top = load(scores + n), total{}, delta{};
      for (int64_t j = 1; j < keys_; ++j) top = max(top, load(scores + j * lanes + n));
      for (int64_t first = 0; first < keys_; first += kTerms) {
        Vec sum{}, weighted{};  // as long as a product's sums
        for (int64_t j = first; j < std::min(keys_, first + kTerms); ++j) {
          const Vec power = exp(load(scores + j * lanes + n) - top);
          sum += power;
          weighted += power * load(dprobs + j * lanes + n);
          store(scores + j * lanes + n, power);
        }
        total += sum, delta += weighted;
      }
      const First valid{static_cast<int>(block.count - n)};
      const bool padded = valid.lanes < kLanes;
      const Vec inverse = 1.0f / total;
      delta *= inverse;
      for (int64_t j = 0; j < keys_; j += Elements::kNumbers) {
        Vec ds[Elements::kNumbers] = {};
        for (int64_t i = j; i < std::min<int64_t>(j + Elements::kNumbers, keys_); ++i) {
          const int64_t at = i * lanes + n;
          Vec p = load(scores + at) * inverse;
          ds[i - j] = p * (load(dprobs + at) - delta);
          if (padded) p = keep(p, valid), ds[i - j] = keep(ds[i - j], valid);
          Elements::store_left(p_left_, at, p);
          if (Elements::kNumbers > 1) Elements::store_left(ds_left_, at, ds[i - j]);
          if (dbias) store(dbias + at, load(dbias + at) + ds[i - j]);
        }
        store(dprobs + j / Elements::kNumbers * lanes + n, Elements::join(ds));
      }
    }
  }

  Left p() const { return {p_left_, elements<Elements>(lanes_), 1}; }    // (keys, lanes)
  Left ds() const { return {ds_left_, elements<Elements>(lanes_), 1}; }  // (keys, lanes)
  Rows ds_over_keys() const { return {dprobs, lanes_}; }                 // (keys, lanes)

 private:
  int64_t keys_, lanes_ = 0;

 public:
  float *scores, *dprobs;

 private:
  float *p_left_, *ds_left_;
};

template <class Number, class Elements>
inline void backward_range(const WindowAttention& a, int64_t begin, int64_t end) {
  const Windows windows(a);
  const int64_t tokens = windows.tokens, width = a.head_dim, row = padded(width);
  const int64_t block = std::min(kBackwardQueries, padded(tokens));
  const bool fits = Bias::head_fits(a);
  const int64_t heads_at_once = a.by_window() ? a.heads : 1;
  const int64_t dbias_size = !a.dtable ? 0 : fits ? heads_at_once * a.bias_size() : tokens * block;
  Scratch scratch(2 * LeftSide<Elements>::size(tokens, width) + Bias::size(a, block) +
                  2 * RightSide<Elements>::size(block, row) +
                  Scores<Elements>::size(tokens, block) + 2 * Scratch::round(tokens * row) +
                  Scratch::round(row * block) + 2 * Scratch::round(row) +
                  Scratch::round(dbias_size));
  LeftSide<Elements> k(scratch, tokens, width), v(scratch, tokens, width);
  Bias bias(scratch, windows, block);
  RightSide<Elements> q(scratch, block, row), dout(scratch, block, row);
  Scores<Elements> scores(scratch, tokens, block);
  float* dk = scratch.take(tokens * row);
  float* dv = scratch.take(tokens * row);
  float* dq = scratch.take(row * block);
  float* dq_time = scratch.take(row);
  float* dv_time = scratch.take(row);
  float* dbias = scratch.take(dbias_size);

  for (int64_t task = begin; task < end; ++task) {
    const int64_t group = a.by_window() ? task : task % a.groups;
    const int64_t first_head = a.by_window() ? 0 : task / a.groups;
    const int64_t first_window = windows.of_head * group / a.groups;
    const int64_t problems =
        (windows.of_head * (group + 1) / a.groups - first_window) * heads_at_once;
    const auto problem_of = [&](int64_t i) {
      const int64_t window = i / heads_at_once;
      return Problem(windows, first_head + i - window * heads_at_once, first_window + window);
    };
    float* dtables = a.dtable + (group * a.heads + first_head) * windows.table_size;
    if (a.dtable) {
      std::memset(dtables, 0, heads_at_once * windows.table_size * sizeof(float));
      std::memset(dbias, 0, dbias_size * sizeof(float));
    }
    Problem problem = problem_of(0);
    for (int64_t i = 0; i < problems; ++i) {
      const Problem next = problem_of(std::min(i + 1, problems - 1));
      const int64_t head = problem.head, window = problem.window;
      const auto in = [&](int64_t part, const Problem& of) {
        return part_of<const Number>(windows, a.qkv, 3, part, of);
      };
      const auto out = [&](int64_t part, const Problem& of) {
        return part_of<Number>(windows, a.dqkv, 3, part, of);
      };
      k.gather(in(1, problem), tokens);
      v.gather(in(2, problem), tokens);
      std::memset(dq_time, 0, row * sizeof(float));
      std::memset(dv_time, 0, row * sizeof(float));
      const auto grad = [&](const Problem& of) {
        return part_of<const Number>(windows, a.grad_out, 1, 0, of);
      };
      const auto target = [&](int64_t part) {
        return part_of<const Number>(windows, a.dqkv, 3, part, next);
      };
      const Tokens<const Number> ahead[] = {in(0, next), in(1, next), in(2, next), grad(next),
                                            target(0),   target(1),   target(2)};
      Prefetch<Number> prefetch(ahead, tokens <= kTaskQueries ? 7 : 0, tokens,
                                4 * ((tokens + block - 1) / block));
      float* dbias_of_head = dbias + (a.by_window() ? head * a.bias_size() : 0);

      for (int64_t first = 0; first < tokens; first += block) {
        const QueryBlock queries = query_block(windows, first, block);
        const int64_t lanes = queries.lanes, steps = elements<Elements>(width);
        q.gather(in(0, problem), queries, time_part(windows, 0, problem), a.scale);
        dout.gather(grad(problem), queries, nullptr, 1.0f);
        dout.add_rows_to(dv_time);
        wide_product<Elements>(tokens, lanes, k.over_channels(0), q.over_channels(), steps,
                               {bias.expanded(head, queries), lanes}, scores.scores, lanes);
        prefetch.step();
        wide_product<Elements>(tokens, lanes, v.over_channels(0), dout.over_channels(), steps,
                               {nullptr, 0}, scores.dprobs, lanes);
        prefetch.step();
        float* dbias_of_block = dbias_of_head + (fits ? first * tokens : 0);
        scores.take(queries, a.dtable ? dbias_of_block : nullptr);
        wide_product<Elements>(width, lanes, k.over_tokens(0), scores.ds_over_keys(),
                               elements<Elements>(tokens), {nullptr, 0}, dq, lanes);
        scatter_columns(dq, lanes, nullptr, a.scale, nullptr, out(0, problem), first, queries.count,
                        dq_time);
        prefetch.step();
        wide_product<Elements>(tokens, row, scores.p(), dout.over_tokens(), dout.steps(),
                               {first ? dv : nullptr, row}, dv, row);
        prefetch.step();
        wide_product<Elements>(tokens, row, scores.ds(), q.over_tokens(), q.steps(),
                               {first ? dk : nullptr, row}, dk, row);
        if (a.dtable && !fits) {
          fold_bias(windows, dbias, queries, dtables);
          std::memset(dbias, 0, dbias_size * sizeof(float));
        }
      }
      scatter_rows(dk, row, out(1, problem), tokens);
      scatter_rows(dv, row, out(2, problem), tokens);
      if (a.dtemb) {
        float* to = a.dtemb + window * 2 * windows.channels + head * width;
        std::memcpy(to, dq_time, width * sizeof(float));
        std::memcpy(to + windows.channels, dv_time, width * sizeof(float));
      }
      problem = next;
    }
    for (int64_t head = 0; a.dtable && fits && head < heads_at_once; ++head) {
      for (int64_t first = 0; first < tokens; first += block) {
        fold_bias(windows, dbias + head * a.bias_size() + first * tokens,
                  query_block(windows, first, block), dtables + head * windows.table_size);
      }
    }
  }
}

#if defined(DIFFIT_BFLOAT16_DOT)
using BFloat16Elements = BFloat16Pairs;
#else
using BFloat16Elements = Floats;
#endif

inline void window_attention_forward(const WindowAttention& a, int64_t begin, int64_t end) {
  switch (a.number) {
    case Number::kFloat32:
      return forward_range<float, Floats>(a, begin, end);
    case Number::kBFloat16:
      return forward_range<BFloat16, BFloat16Elements>(a, begin, end);
    case Number::kFloat16:
      return forward_range<Half, Floats>(a, begin, end);
  }
}

inline void window_attention_backward(const WindowAttention& a, int64_t begin, int64_t end) {
  switch (a.number) {
    case Number::kFloat32:
      return backward_range<float, Floats>(a, begin, end);
    case Number::kBFloat16:
      return backward_range<BFloat16, BFloat16Elements>(a, begin, end);
    case Number::kFloat16:
      return backward_range<Half, Floats>(a, begin, end);
  }
}

}  // namespace diffit::DIFFIT_ISA
