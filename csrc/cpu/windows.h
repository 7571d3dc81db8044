// Windows by index arithmetic, and the position bias as their tokens' places define it.
#pragma once

#include <vector>

#include "cpu/simd.h"

namespace diffit::DIFFIT_ISA {

// The problems of a call: one per head, sample and window, in this order.
struct Windows {
  explicit Windows(const WindowAttention& a)
      : tokens(a.tokens()),
        across(a.width / a.window_width),
        per_sample(a.height / a.window_height * across),
        of_head(a.batch * per_sample),
        channels(a.heads * a.head_dim),
        centre((a.window_height - 1) * (2 * a.window_width - 1) + a.window_width - 1),
        table_size(a.table_size()),
        call(a),
        offset(tokens),
        place(tokens) {
    for (int64_t i = 0; i < tokens; ++i) {
      const int64_t y = i / a.window_width, x = i % a.window_width;
      offset[i] = y * a.width + x;
      place[i] = y * (2 * a.window_width - 1) + x;
    }
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

// A window of the batch and a head.
struct Problem {
  Problem(const Windows& windows, int64_t head, int64_t window)
      : head(head), window(window), sample(window / windows.per_sample) {
    const WindowAttention& a = windows.call;
    const int64_t within = window - sample * windows.per_sample, down = within / windows.across;
    first_token = (sample * a.height + down * a.window_height) * a.width +
                  (within - down * windows.across) * a.window_width;
  }

  int64_t head, window, sample;
  int64_t first_token;  // in the (B, H, W) grid
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

// The transpose of expand_bias: adds (keys, lanes) to a head's table. Keys go down a column of the
// window: those of a row overlap in the table, and would wait for each other's stores.
inline void fold_bias(const Windows& windows, const float* bias, QueryBlock block, float* table) {
  const int64_t keys = windows.tokens, width = windows.call.window_width;
  for_each_run(windows, block, [&](int64_t lane, int64_t length, int64_t place) {
    for (int64_t column = 0; column < width; ++column) {
      for (int64_t j = column; j < keys; j += width) {
        const float* from = bias + j * block.lanes + lane;
        float* to = table + place - windows.place[j];
        int64_t i = 0;
        for (; i + kLanes <= length; i += kLanes) store(to + i, load(to + i) + load(from + i));
        if (i < length) {
          const int n = length - i;
          store(to + i, load(to + i, n) + load(from + i, n), n);
        }
      }
    }
  });
}

}  // namespace diffit::DIFFIT_ISA
