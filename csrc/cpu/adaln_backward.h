// The gradients of adaln, with du = grad_out · factor and x̂ taken again from the saved statistics:
//
//     dx = rstd (du - mean(du) - x̂ mean(du x̂)) + grad_residual        dy = gate · dx
//     dgate = Σ y dx    dshift = Σ grad_out    dscale = Σ grad_out (x̂ weight + bias)
//     dweight = Σ h x̂   dbias = Σ h            h = grad_out (1 + scale)
//
// A task is a chunk of one sample's tokens, and leaves its sums; adaln_sums adds them up. A scale
// per sample is a common factor: there h is grad_out in the sums, and every gradient follows from
// Σ h and Σ h x̂.
#pragma once

#include "cpu/adaln.h"

namespace diffit::DIFFIT_ISA {

// What a row's gradient is made of.
template <class X>
struct Normed {
  const X* x;
  const X* dout;
  const float* factor;
  float mean, rstd;

  template <class Lanes>
  DIFFIT_INLINE Vec at(int64_t c, Lanes lanes) const {
    return (load(x + c, lanes) - mean) * rstd;
  }
};

struct Means {
  float du, du_normed;
};

// The means of a row, and Σ h and Σ h x̂ on the way if there is anything to sum.
template <bool kSums, class X>
DIFFIT_INLINE Means means_of(const Normed<X>& row, const float* scale, float* sum,
                             float* sum_normed, int64_t channels) {
  Vec du[2] = {}, du_normed[2] = {};
  by_vector<2>(channels, [&](int64_t c, auto lanes, int way) DIFFIT_BODY {
    const Vec dout = load(row.dout + c, lanes), normed = row.at(c, lanes);
    const Vec part = dout * load(row.factor + c, lanes);
    du[way] += part;
    du_normed[way] += part * normed;
    if constexpr (kSums) {
      const Vec h = scale ? dout * (load(scale + c, lanes) + 1.0f) : dout;
      add_to(sum + c, h, lanes);
      add_to(sum_normed + c, h * normed, lanes);
    }
  });
  return {DIFFIT_ISA::sum(du) / channels, DIFFIT_ISA::sum(du_normed) / channels};
}

// The gradients of modulations per token: dshift = grad_out, dscale = grad_out (x̂ weight + bias).
template <class X>
inline void token_gradients(const AdaLN& a, const Normed<X>& row, const Affine& affine, int64_t at,
                            float* room) {
  if (a.shift.grad && a.shift.token_stride) {
    by_vector<1>(a.channels, [&](int64_t c, auto lanes, int) DIFFIT_BODY {
      store(room + c, load(row.dout + c, lanes), lanes);
    });
    from_floats(room, a.channels, a.shift.grad, a.shift.number, at);
  }
  if (a.scale.grad && a.scale.token_stride) {
    by_vector<1>(a.channels, [&](int64_t c, auto lanes, int) DIFFIT_BODY {
      Vec z = row.at(c, lanes);
      if (affine.weight) z *= load(affine.weight + c, lanes);
      if (affine.bias) z += load(affine.bias + c, lanes);
      store(room + c, load(row.dout + c, lanes) * z, lanes);
    });
    from_floats(room, a.channels, a.scale.grad, a.scale.number, at);
  }
}

// dx, and with y also dy and the gate's part: y dx is added to `sum_branch`, if there is one.
template <class X, class Y>
DIFFIT_INLINE void row_gradients(const AdaLN& a, const Normed<X>& row, Means means, int64_t at,
                                 const float* gate, float* sum_branch) {
  const auto* dresidual = a.grad_residual ? static_cast<const X*>(a.grad_residual) + at : nullptr;
  X* dx = static_cast<X*>(a.dx) + at;
  const auto gradient = [&](int64_t c, auto lanes) DIFFIT_BODY {
    const Vec du = load(row.dout + c, lanes) * load(row.factor + c, lanes);
    const Vec value = (du - means.du - row.at(c, lanes) * means.du_normed) * row.rstd;
    return dresidual ? value + load(dresidual + c, lanes) : value;
  };
  if (!a.y.data) {
    by_vector<2>(a.channels, [&](int64_t c, auto lanes, int)
                                 DIFFIT_BODY { store(dx + c, gradient(c, lanes), lanes); });
    return;
  }
  const Y* y = static_cast<const Y*>(a.y.data) + at;
  Y* dy = static_cast<Y*>(a.dy) + at;
  by_vector<2>(a.channels, [&](int64_t c, auto lanes, int) DIFFIT_BODY {
    const Vec value = gradient(c, lanes);
    store(dx + c, value, lanes);
    store(dy + c, value * load(gate + c, lanes), lanes);
    if (sum_branch) add_to(sum_branch + c, value * load(y + c, lanes), lanes);
  });
}

template <class X, class Y, bool kSums>
inline void adaln_backward_chunks(const AdaLN& a, int64_t begin, int64_t end) {
  const int64_t channels = a.channels;
  Scratch scratch(Affine::floats(channels) + Gate::floats(channels) + Scratch::round(channels));
  Affine affine(a, scratch);
  Gate gate(a, scratch);
  float* room = scratch.take(channels);
  const bool gate_per_token = a.gate.grad && a.gate.token_stride;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t sample = task / a.chunks, chunk = task % a.chunks;
    float* sums[] = {a.sum, a.sum_normed, a.sum_branch, a.sum_dout};
    for (float*& sum : sums) {
      if (sum) fill_row(sum += task * channels, channels, 0.0f);
    }
    auto [sum, sum_normed, sum_branch, sum_dout] = sums;
    const int64_t last = (chunk + 1) * a.tokens / a.chunks;
    for (int64_t token = chunk * a.tokens / a.chunks; token < last; ++token) {
      const int64_t index = sample * a.tokens + token, at = index * channels;
      affine.move_to(sample, token);
      const Normed<X> row{static_cast<const X*>(a.x) + at, static_cast<const X*>(a.grad_out) + at,
                          affine.factor, a.mean[index], a.rstd[index]};
      const float* scale = a.scale.token_stride ? affine.scale.row : nullptr;
      const Means means = means_of<kSums>(row, scale, sum, sum_normed, channels);
      if (sum_dout) {
        by_vector<1>(channels, [&](int64_t c, auto lanes, int) DIFFIT_BODY {
          add_to(sum_dout + c, load(row.dout + c, lanes), lanes);
        });
      }
      if (gate_per_token) fill_row(sum_branch = room, channels, 0.0f);
      row_gradients<X, Y>(a, row, means, at, gate.at(sample, token), sum_branch);
      if (gate_per_token) from_floats(room, channels, a.gate.grad, a.gate.number, at);
      token_gradients(a, row, affine, at, room);
    }
  }
}

inline void adaln_backward(const AdaLN& a, int64_t begin, int64_t end) {
  with_number(a.number, [&](auto x) {
    with_number(a.y.number, [&](auto y) {
      a.sum ? adaln_backward_chunks<decltype(x), decltype(y), true>(a, begin, end)
            : adaln_backward_chunks<decltype(x), decltype(y), false>(a, begin, end);
    });
  });
}

// The gradients that are sums over tokens; tasks are blocks of kSumColumns channels.
inline void adaln_sums(const AdaLN& a, int64_t begin, int64_t end) {
  const int64_t channels = a.channels, first = begin * kSumColumns;
  const int64_t last = end * kSumColumns < channels ? end * kSumColumns : channels;
  const auto per_sample = [](const Modulation& m) { return m.grad && !m.token_stride; };
  by_vector<1>(last - first, [&](int64_t from_first, auto lanes, int) {
    const int64_t c = first + from_first;
    const Vec weight =
        a.weight.data ? load_as(a.weight.data, a.weight.number, c, lanes) : fill(1.0f);
    const Vec bias = a.bias.data ? load_as(a.bias.data, a.bias.number, c, lanes) : Vec{};
    Vec dweight{}, dbias{};
    for (int64_t sample = 0; sample < a.samples; ++sample) {
      const auto total = [&](const float* sums) {
        if (!sums) return Vec{};
        return sum_down(sums + sample * a.chunks * channels + c, a.chunks, channels, lanes);
      };
      const auto put = [&](const Modulation& m, Vec grad) {
        store_as(m.grad, m.number, sample * channels + c, grad, lanes);
      };
      const Vec h = total(a.sum), h_normed = total(a.sum_normed);
      Vec factor = fill(1.0f);
      if (per_sample(a.gate)) put(a.gate, total(a.sum_branch));
      if (per_sample(a.shift)) put(a.shift, a.sum_dout ? total(a.sum_dout) : h);
      if (per_sample(a.scale)) {
        put(a.scale, h_normed * weight + h * bias);
        factor += load_as(a.scale.data, a.scale.number, sample * a.scale.sample_stride + c, lanes);
      }
      dweight += h_normed * factor;
      dbias += h * factor;
    }
    if (a.dweight) store_as(a.dweight, a.weight.number, c, dweight, lanes);
    if (a.dbias) store_as(a.dbias, a.bias.number, c, dbias, lanes);
  });
}

}  // namespace diffit::DIFFIT_ISA
