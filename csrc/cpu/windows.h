// Windows by index arithmetic, and the position bias as their tokens' places define it.
#pragma once

#include <vector>

#include "cpu/simd.h"

namespace diffit::DIFFIT_ISA {

// The problems of a call: one per head, sample and window, in this order.
struct Windows {
  explicit Windows(const WindowAttention& a)
      : tokens(a.window_height * a.window_width),
        across(a.width / a.window_width),
        per_sample(a.height / a.window_height * across),
        of_head(a.batch * per_sample),
        channels(a.heads * a.head_dim),
        centre((a.window_height - 1) * (2 * a.window_width - 1) + a.window_width - 1),
        table_size((2 * a.window_height - 1) * (2 * a.window_width - 1)),
        call(a),
        offset(tokens),
        place(tokens) {
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t y = i / a.window_width, x = i % a.window_width;
      offset[i] = y * a.width + x;
      place[i] = y * (2 * a.window_width - 1) + x;
    }
  }

  // The number of a window's first token in the (B, H, W) grid; `window` counts through the batch.
  int64_t first_token(int64_t window) const {
    const int64_t sample = window / per_sample, within = window % per_sample;
    const int64_t y = within / across * call.window_height, x = within % across * call.window_width;
    return (sample * call.height + y) * call.width + x;
  }

  int64_t tokens;      // of a window
  int64_t across;      // windows side by side
  int64_t per_sample;  // windows
  int64_t of_head;     // windows of the batch
  int64_t channels;
  int64_t centre;      // the table's entry for no distance
  int64_t table_size;  // entries of a head
  const WindowAttention& call;
  std::vector<int64_t> offset;  // of a window's tokens from its first, in tokens
  std::vector<int64_t> place;   // bias[i, j] = table[centre + place[i] - place[j]]
};

// A block of queries as lanes: `count` of them from `first` on, padded to `lanes`.
struct QueryBlock {
  int64_t first, count, lanes;
};

inline QueryBlock query_block(const Windows& windows, int64_t first, int64_t size) {
  const int64_t count = std::min(size, windows.tokens - first);
  return {first, count, (count + kLanes - 1) / kLanes * kLanes};
}

// Calls `visit(lane, length, place)` for each run of queries of one row of the window: what they
// read of the table lies side by side.
template <class Visit>
DIFFIT_INLINE void for_each_run(const Windows& windows, QueryBlock block, Visit visit) {
  const int64_t width = windows.call.window_width;
  for (int64_t lane = 0; lane < block.count;) {
    const int64_t token = block.first + lane;
    const int64_t length = std::min(width - token % width, block.count - lane);
    visit(lane, length, windows.centre + windows.place[token]);
    lane += length;
  }
}

// bias (keys, lanes) of a block of queries against all keys, from a head's table; 0 in lanes that
// pad.
inline void expand_bias(const Windows& windows, const float* table, QueryBlock block, float* bias) {
  const int64_t keys = windows.tokens;
  if (block.count < block.lanes) std::memset(bias, 0, keys * block.lanes * sizeof(float));
  for_each_run(windows, block, [&](int64_t lane, int64_t length, int64_t place) {
    for (int64_t j = 0; j < keys; ++j) {
      const float* from = table + place - windows.place[j];
      float* to = bias + j * block.lanes + lane;
      int64_t i = 0;
      for (; i + kLanes <= length; i += kLanes) store(to + i, load(from + i));
      if (i < length) store(to + i, load(from + i, length - i), length - i);
    }
  });
}

// The transpose of expand_bias: adds (keys, lanes) to a head's table.
inline void fold_bias(const Windows& windows, const float* bias, QueryBlock block, float* table) {
  const int64_t keys = windows.tokens;
  for_each_run(windows, block, [&](int64_t lane, int64_t length, int64_t place) {
    for (int64_t j = 0; j < keys; ++j) {
      const float* from = bias + j * block.lanes + lane;
      float* to = table + place - windows.place[j];
      int64_t i = 0;
      for (; i + kLanes <= length; i += kLanes) store(to + i, load(to + i) + load(from + i));
      if (i < length) {
        const int n = length - i;
        store(to + i, load(to + i, n) + load(from + i, n), n);
      }
    }
  });
}

}  // namespace diffit::DIFFIT_ISA
