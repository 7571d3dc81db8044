// SiLU(GroupNorm(x)) of channels-last feature maps. A sample is cut into chunks of pixels that fit
// the fastest cache: there each channel's mean and sum of squares about it take two passes, and a
// sample's statistics follow from its chunks' without a difference of squares.
#pragma once

#include "cpu/activations.h"
#include "cpu/rows.h"

namespace diffit::DIFFIT_ISA {

// Where task `task`, a chunk of a sample, lies.
struct Pixels {
  Pixels(const GroupNorm& a, int64_t task) : Pixels(a, task / a.chunks, task % a.chunks) {}
  Pixels(const GroupNorm& a, int64_t sample, int64_t chunk)
      : sample(sample),
        chunk(chunk),
        first(chunk * a.pixels / a.chunks),
        count((chunk + 1) * a.pixels / a.chunks - first),
        at((sample * a.pixels + first) * a.channels) {}

  int64_t sample, chunk, first, count, at;
};

template <int kVectors>
struct Block {
  static constexpr int kSize = kVectors;
};

// body(channel, lanes, block) for blocks of kVectors vectors of channels, then for single ones.
template <int kVectors, class Body>
DIFFIT_INLINE void by_block(int64_t channels, Body body) {
  int64_t c = 0;
  for (; c + kVectors * kLanes <= channels; c += kVectors * kLanes) {
    body(c, Whole{}, Block<kVectors>{});
  }
  for (; c + kLanes <= channels; c += kLanes) body(c, Whole{}, Block<1>{});
  if (c < channels) body(c, First{static_cast<int>(channels - c)}, Block<1>{});
}

// Each channel's mean over a chunk, and its sum of squares about that, into `parts`.
template <class X>
inline void chunk_statistics(const GroupNorm& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const Pixels pixels(a, task);
    float *means = a.parts + task * 2 * a.channels, *squares = means + a.channels;
    by_block<4>(a.channels, [&](int64_t c, auto lanes, auto block) DIFFIT_BODY {
      constexpr int kVectors = decltype(block)::kSize;
      const X* x = static_cast<const X*>(a.x) + pixels.at + c;
      Vec mean[kVectors] = {}, square[kVectors] = {};
      for (int64_t pixel = 0; pixel < pixels.count; ++pixel) {
        for (int v = 0; v < kVectors; ++v) {
          mean[v] += load(x + pixel * a.channels + v * kLanes, lanes);
        }
      }
      for (int v = 0; v < kVectors; ++v) mean[v] /= static_cast<float>(pixels.count);
      for (int64_t pixel = 0; pixel < pixels.count; ++pixel) {
        for (int v = 0; v < kVectors; ++v) {
          const Vec centred = load(x + pixel * a.channels + v * kLanes, lanes) - mean[v];
          square[v] += centred * centred;
        }
      }
      for (int v = 0; v < kVectors; ++v) {
        store(means + c + v * kLanes, mean[v], lanes);
        store(squares + c + v * kLanes, square[v], lanes);
      }
    });
  }
}

// What a channel is normalised by, as rows.
class ChannelRows {
 public:
  ChannelRows(const GroupNorm& a, Scratch& scratch)
      : mean(scratch.take(a.channels)), rstd(scratch.take(a.channels)) {
    float *ones = scratch.take(a.channels), *zeros = scratch.take(a.channels);
    fill_row(ones, a.channels, 1.0f);
    fill_row(zeros, a.channels, 0.0f);
    weight = a.weight.data ? as_floats(a.weight.data, a.weight.number, 0, a.channels, ones) : ones;
    bias = a.bias.data ? as_floats(a.bias.data, a.bias.number, 0, a.channels, zeros) : zeros;
  }
  static int64_t floats(int64_t channels) { return 4 * Scratch::round(channels); }

  void move_to(const GroupNorm& a, int64_t sample) {
    const int64_t size = a.channels / a.groups;
    for (int64_t group = 0; group < a.groups; ++group) {
      fill_row(mean + group * size, size, a.mean[sample * a.groups + group]);
      fill_row(rstd + group * size, size, a.rstd[sample * a.groups + group]);
    }
  }

  float *mean, *rstd;
  const float *weight, *bias;
};

// A sample's mean and rstd by group, from its chunks': rooms for the channels' own.
inline void sample_statistics(const GroupNorm& a, int64_t sample, float* means, float* squares) {
  const float* parts = a.parts + sample * a.chunks * 2 * a.channels;
  by_vector<1>(a.channels, [&](int64_t c, auto lanes, int) DIFFIT_BODY {
    // About the first chunk's mean: equal chunks have exactly theirs.
    const Vec first = load(parts + c, lanes);
    Vec mean = first, square{};
    for (int64_t chunk = 1; chunk < a.chunks; ++chunk) {
      const float share = static_cast<float>(Pixels(a, sample, chunk).count) / a.pixels;
      mean += (load(parts + chunk * 2 * a.channels + c, lanes) - first) * share;
    }
    for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
      const float* part = parts + chunk * 2 * a.channels + c;
      const Vec apart = load(part, lanes) - mean;
      const float count = static_cast<float>(Pixels(a, sample, chunk).count);
      square += load(part + a.channels, lanes) + apart * apart * count;
    }
    store(means + c, mean, lanes);
    store(squares + c, square, lanes);
  });
  const int64_t size = a.channels / a.groups;
  for (int64_t group = 0; group < a.groups; ++group) {
    double mean = 0, square = 0;
    for (int64_t c = group * size; c < (group + 1) * size; ++c) mean += means[c];
    mean /= size;
    for (int64_t c = group * size; c < (group + 1) * size; ++c) {
      square += squares[c] + a.pixels * (means[c] - mean) * (means[c] - mean);
    }
    const double variance = square / (static_cast<double>(size) * a.pixels);
    a.mean[sample * a.groups + group] = static_cast<float>(mean);
    a.rstd[sample * a.groups + group] = static_cast<float>(1.0 / std::sqrt(variance + a.eps));
  }
}

template <class X>
inline void normalise_chunks(const GroupNorm& a, int64_t begin, int64_t end) {
  Scratch scratch(ChannelRows::floats(a.channels));
  ChannelRows rows(a, scratch);
  int64_t sample = -1;
  for (int64_t task = begin; task < end; ++task) {
    const Pixels pixels(a, task);
    if (pixels.sample != sample) rows.move_to(a, sample = pixels.sample);
    by_block<2>(a.channels, [&](int64_t c, auto lanes, auto block) DIFFIT_BODY {
      constexpr int kVectors = decltype(block)::kSize;
      const X* x = static_cast<const X*>(a.x) + pixels.at + c;
      X* out = static_cast<X*>(a.out) + pixels.at + c;
      Vec mean[kVectors], factor[kVectors], bias[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = c + v * kLanes;
        mean[v] = load(rows.mean + at, lanes);
        factor[v] = load(rows.rstd + at, lanes) * load(rows.weight + at, lanes);
        bias[v] = load(rows.bias + at, lanes);
      }
      for (int64_t pixel = 0; pixel < pixels.count; ++pixel) {
        for (int v = 0; v < kVectors; ++v) {
          const int64_t at = pixel * a.channels + v * kLanes;
          const Vec z = (load(x + at, lanes) - mean[v]) * factor[v] + bias[v];
          store(out + at, silu_and_slope(z).value, lanes);
        }
      }
    });
  }
}

// Three steps, each for tasks that are chunks, but for the second, whose are samples.
inline void group_norm_statistics(const GroupNorm& a, int64_t begin, int64_t end) {
  with_number(a.number, [&](auto x) { chunk_statistics<decltype(x)>(a, begin, end); });
}

inline void group_norm_merge(const GroupNorm& a, int64_t begin, int64_t end) {
  Scratch scratch(2 * Scratch::round(a.channels));
  float *means = scratch.take(a.channels), *squares = scratch.take(a.channels);
  for (int64_t sample = begin; sample < end; ++sample) {
    sample_statistics(a, sample, means, squares);
  }
}

inline void group_norm_normalise(const GroupNorm& a, int64_t begin, int64_t end) {
  with_number(a.number, [&](auto x) { normalise_chunks<decltype(x)>(a, begin, end); });
}

}  // namespace diffit::DIFFIT_ISA
