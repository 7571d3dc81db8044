// LayerNorm with adaptive modulation, and the gated residual before it, a row at a time.
//
//     x   <- x + gate · y
//     out  = x̂ factor + offset        x̂ = (x - mean) rstd
//     factor = weight (1 + scale)     offset = bias (1 + scale) + shift
//
// A row is read from memory once: its statistics take two more passes, over the first-level cache.
#pragma once

#include "cpu/rows.h"

namespace diffit::DIFFIT_ISA {

// The row of a modulation that a token meets, as floats.
class ModulationRow {
 public:
  ModulationRow(const Modulation& modulation, int64_t channels, Scratch& scratch)
      : modulation_(modulation), channels_(channels), room_(scratch.take(channels)) {}

  // Whether this token's row is another one than the last token's.
  bool move_to(int64_t sample, int64_t token) {
    if (!modulation_.data) return false;
    const int64_t first = sample * modulation_.sample_stride + token * modulation_.token_stride;
    if (first == first_) return false;
    first_ = first;
    row = as_floats(modulation_.data, modulation_.number, first, channels_, room_);
    return true;
  }

  const float* row = nullptr;  // null if there is no such modulation

 private:
  const Modulation& modulation_;
  int64_t channels_, first_ = -1;
  float* room_;
};

// factor and offset of a token.
class Affine {
 public:
  Affine(const AdaLN& a, Scratch& scratch)
      : shift(a.shift, a.channels, scratch),
        scale(a.scale, a.channels, scratch),
        weight(row_of(a.weight, a.channels, scratch)),
        bias(row_of(a.bias, a.channels, scratch)),
        factor(scratch.take(a.channels)),
        offset(scratch.take(a.channels)),
        channels_(a.channels) {
    compute();
  }
  static int64_t floats(int64_t channels) { return 6 * Scratch::round(channels); }

  void move_to(int64_t sample, int64_t token) {
    const bool shifted = shift.move_to(sample, token), scaled = scale.move_to(sample, token);
    if (shifted || scaled) compute();
  }

  ModulationRow shift, scale;
  const float *weight, *bias;  // null if not given
  float *factor, *offset;

 private:
  static const float* row_of(const Input& input, int64_t channels, Scratch& scratch) {
    float* room = scratch.take(channels);
    return input.data ? as_floats(input.data, input.number, 0, channels, room) : nullptr;
  }

  void compute() {
    by_vector<1>(channels_, [&](int64_t c, auto lanes, int) DIFFIT_BODY {
      Vec by = weight ? load(weight + c, lanes) : fill(1.0f);
      Vec add = bias ? load(bias + c, lanes) : Vec{};
      if (scale.row) {
        const Vec wider = load(scale.row + c, lanes) + 1.0f;
        by *= wider;
        add *= wider;
      }
      if (shift.row) add += load(shift.row + c, lanes);
      store(factor + c, by, lanes);
      store(offset + c, add, lanes);
    });
  }

  int64_t channels_;
};

// The factor of the branch: gate, or ones.
class Gate {
 public:
  Gate(const AdaLN& a, Scratch& scratch)
      : gate_(a.gate, a.channels, scratch), ones_(scratch.take(a.channels)) {
    fill_row(ones_, a.channels, 1.0f);
  }
  static int64_t floats(int64_t channels) { return 2 * Scratch::round(channels); }

  const float* at(int64_t sample, int64_t token) {
    gate_.move_to(sample, token);
    return gate_.row ? gate_.row : ones_;
  }

 private:
  ModulationRow gate_;
  float* ones_;
};

constexpr int kWays = 4;

// The sum of x + gate · y, which is stored as the new residual; normed is what was stored.
template <class X, class Y>
DIFFIT_INLINE float add_branch(const X* x, const Y* y, const float* gate, X* residual,
                               int64_t channels) {
  Vec total[kWays] = {};
  by_vector<kWays>(channels, [&](int64_t c, auto lanes, int way) DIFFIT_BODY {
    const Vec value = load(x + c, lanes) + load(gate + c, lanes) * load(y + c, lanes);
    store(residual + c, value, lanes);
    total[way] += rounded<X>(value);
  });
  return sum(total);
}

template <class X>
DIFFIT_INLINE float sum_row(const X* x, int64_t channels) {
  Vec total[kWays] = {};
  by_vector<kWays>(channels, [&](int64_t c, auto lanes, int way)
                                 DIFFIT_BODY { total[way] += load(x + c, lanes); });
  return sum(total);
}

template <class X>
DIFFIT_INLINE float sum_squares(const X* x, float mean, int64_t channels) {
  Vec total[kWays] = {};
  by_vector<kWays>(channels, [&](int64_t c, auto lanes, int way) DIFFIT_BODY {
    const Vec centred = keep(load(x + c, lanes) - mean, lanes);
    total[way] += centred * centred;
  });
  return sum(total);
}

template <class X, class Y>
inline void adaln_forward_rows(const AdaLN& a, int64_t begin, int64_t end) {
  const int64_t channels = a.channels;
  Scratch scratch(Affine::floats(channels) + Gate::floats(channels));
  Affine affine(a, scratch);
  Gate gate(a, scratch);
  const auto* y = static_cast<const Y*>(a.y.data);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sample = row / a.tokens, token = row % a.tokens, at = row * channels;
    const X* x = static_cast<const X*>(a.x) + at;
    float total;
    if (y) {
      X* residual = static_cast<X*>(a.residual) + at;
      total = add_branch(x, y + at, gate.at(sample, token), residual, channels);
      x = residual;
    } else {
      total = sum_row(x, channels);
    }
    const float mean = total / channels;
    const float rstd = 1.0f / std::sqrt(sum_squares(x, mean, channels) / channels + a.eps);
    affine.move_to(sample, token);
    X* out = static_cast<X*>(a.out) + at;
    by_vector<kWays>(channels, [&](int64_t c, auto lanes, int) DIFFIT_BODY {
      const Vec normed = (load(x + c, lanes) - mean) * rstd;
      const Vec value = normed * load(affine.factor + c, lanes) + load(affine.offset + c, lanes);
      store(out + c, value, lanes);
    });
    a.mean[row] = mean;
    a.rstd[row] = rstd;
  }
}

inline void adaln_forward(const AdaLN& a, int64_t begin, int64_t end) {
  const int64_t rows = a.samples * a.tokens;
  end = end * kAdaLNRows < rows ? end * kAdaLNRows : rows;
  with_number(a.number, [&](auto x) {
    with_number(a.y.number, [&](auto y) {
      adaln_forward_rows<decltype(x), decltype(y)>(a, begin * kAdaLNRows, end);
    });
  });
}

}  // namespace diffit::DIFFIT_ISA
