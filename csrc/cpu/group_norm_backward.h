// The gradients of group_norm_silu. With z = x̂ weight + bias, s = σ(z) and g = dz · weight:
//
//     dz = grad_out · s (1 + z (1 - s))    dx = rstd (g - mean(g) - x̂ mean(g x̂))
//     dweight = Σ dz x̂    dbias = Σ dz
//
// Chunks leave Σ dz and Σ dz x̂ by channel, from which the means and the parameters' gradients
// follow; a second pass takes dz again, which is cheaper than to keep it.
#pragma once

#include "cpu/group_norm.h"

namespace diffit::DIFFIT_ISA {

// kVectors vectors of channels: their rows, and a pixel's x̂ and dz.
template <int kVectors>
struct Channels {
  template <class Lanes>
  DIFFIT_INLINE Channels(const ChannelRows& rows, int64_t c, Lanes lanes) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = c + v * kLanes;
      mean[v] = load(rows.mean + at, lanes), rstd[v] = load(rows.rstd + at, lanes);
      weight[v] = load(rows.weight + at, lanes), bias[v] = load(rows.bias + at, lanes);
    }
  }
  DIFFIT_INLINE Vec normed(Vec x, int v) const { return (x - mean[v]) * rstd[v]; }
  DIFFIT_INLINE Vec dz(Vec dout, Vec normed, int v) const {
    return dout * silu_and_slope(normed * weight[v] + bias[v]).slope;
  }

  Vec mean[kVectors], rstd[kVectors], weight[kVectors], bias[kVectors];
};

template <class X>
inline void chunk_sums(const GroupNorm& a, int64_t begin, int64_t end) {
  Scratch scratch(ChannelRows::floats(a.channels));
  ChannelRows rows(a, scratch);
  int64_t sample = -1;
  for (int64_t task = begin; task < end; ++task) {
    const Pixels pixels(a, task);
    if (pixels.sample != sample) rows.move_to(a, sample = pixels.sample);
    by_block<2>(a.channels, [&](int64_t c, auto lanes, auto block) DIFFIT_BODY {
      constexpr int kVectors = decltype(block)::kSize;
      const X* x = static_cast<const X*>(a.x) + pixels.at + c;
      const X* dout = static_cast<const X*>(a.grad_out) + pixels.at + c;
      const Channels<kVectors> channels(rows, c, lanes);
      Vec sum[kVectors] = {}, sum_normed[kVectors] = {};
      for (int64_t pixel = 0; pixel < pixels.count; ++pixel) {
        for (int v = 0; v < kVectors; ++v) {
          const int64_t at = pixel * a.channels + v * kLanes;
          const Vec normed = channels.normed(load(x + at, lanes), v);
          const Vec dz = channels.dz(load(dout + at, lanes), normed, v);
          sum[v] += dz;
          sum_normed[v] += dz * normed;
        }
      }
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = task * a.channels + c + v * kLanes;
        store(a.sum + at, sum[v], lanes);
        store(a.sum_normed + at, sum_normed[v], lanes);
      }
    });
  }
}

// to = the means over each group of a sample's sums, weighted, as a row. `room` is for a row.
inline void group_means(const GroupNorm& a, const float* sums, int64_t sample, const float* weight,
                        float* room, float* to) {
  by_vector<1>(a.channels, [&](int64_t c, auto lanes, int) DIFFIT_BODY {
    const float* first = sums + sample * a.chunks * a.channels + c;
    const Vec total = sum_down(first, a.chunks, a.channels, lanes);
    store(room + c, total * load(weight + c, lanes), lanes);
  });
  const int64_t size = a.channels / a.groups;
  for (int64_t group = 0; group < a.groups; ++group) {
    double total = 0;
    for (int64_t c = group * size; c < (group + 1) * size; ++c) total += room[c];
    fill_row(to + group * size, size, static_cast<float>(total / (size * a.pixels)));
  }
}

template <class X>
inline void input_gradients(const GroupNorm& a, int64_t begin, int64_t end) {
  Scratch scratch(ChannelRows::floats(a.channels) + 3 * Scratch::round(a.channels));
  ChannelRows rows(a, scratch);
  float *mean_g = scratch.take(a.channels), *mean_gx = scratch.take(a.channels),
        *room = scratch.take(a.channels);
  int64_t sample = -1;
  for (int64_t task = begin; task < end; ++task) {
    const Pixels pixels(a, task);
    if (pixels.sample != sample) {
      rows.move_to(a, sample = pixels.sample);
      group_means(a, a.sum, sample, rows.weight, room, mean_g);
      group_means(a, a.sum_normed, sample, rows.weight, room, mean_gx);
    }
    by_block<2>(a.channels, [&](int64_t c, auto lanes, auto block) DIFFIT_BODY {
      constexpr int kVectors = decltype(block)::kSize;
      const X* x = static_cast<const X*>(a.x) + pixels.at + c;
      const X* dout = static_cast<const X*>(a.grad_out) + pixels.at + c;
      X* dx = static_cast<X*>(a.dx) + pixels.at + c;
      const Channels<kVectors> channels(rows, c, lanes);
      for (int64_t pixel = 0; pixel < pixels.count; ++pixel) {
        for (int v = 0; v < kVectors; ++v) {
          const int64_t at = pixel * a.channels + v * kLanes;
          const Vec normed = channels.normed(load(x + at, lanes), v);
          const Vec g = channels.dz(load(dout + at, lanes), normed, v) * channels.weight[v];
          const Vec mean = load(mean_g + c + v * kLanes, lanes);
          const Vec along = normed * load(mean_gx + c + v * kLanes, lanes);
          store(dx + at, (g - mean - along) * channels.rstd[v], lanes);
        }
      }
    });
  }
}

// Tasks of both are chunks.
inline void group_norm_sums(const GroupNorm& a, int64_t begin, int64_t end) {
  with_number(a.number, [&](auto x) { chunk_sums<decltype(x)>(a, begin, end); });
}

inline void group_norm_input(const GroupNorm& a, int64_t begin, int64_t end) {
  with_number(a.number, [&](auto x) { input_gradients<decltype(x)>(a, begin, end); });
}

}  // namespace diffit::DIFFIT_ISA
