// What lies between the products of an MLP: GELU, and its gradient with the sums for the bias.
#pragma once

#include "cpu/activations.h"
#include "cpu/rows.h"

namespace diffit::DIFFIT_ISA {

// activation = GELU(hidden); tasks are blocks of kGeluBlock numbers.
template <class X, class Form>
inline void gelu_blocks(const Gelu& a, int64_t begin, int64_t end) {
  const int64_t size = a.rows * a.columns, first = begin * kGeluBlock;
  const int64_t last = end * kGeluBlock < size ? end * kGeluBlock : size;
  const auto* hidden = static_cast<const X*>(a.hidden) + first;
  auto* activation = static_cast<X*>(a.activation) + first;
  by_vector<4>(last - first, [&](int64_t i, auto lanes, int) DIFFIT_BODY {
    store(activation + i, Form::at(load(hidden + i, lanes)).value, lanes);
  });
}

// activation = GELU(hidden) and grad = grad · GELU'(hidden) in place, whose sums over a chunk of
// rows go to `sum`; tasks are chunks.
template <class X, class Form>
inline void gelu_gradients(const Gelu& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    float* sum = a.sum ? a.sum + task * a.columns : nullptr;
    if (sum) fill_row(sum, a.columns, 0.0f);
    const int64_t last = (task + 1) * a.rows / a.chunks;
    for (int64_t row = task * a.rows / a.chunks; row < last; ++row) {
      const auto* hidden = static_cast<const X*>(a.hidden) + row * a.columns;
      auto* activation = static_cast<X*>(a.activation) + row * a.columns;
      auto* grad = static_cast<X*>(a.grad) + row * a.columns;
      by_vector<2>(a.columns, [&](int64_t c, auto lanes, int) DIFFIT_BODY {
        const ValueAndSlope gelu = Form::at(load(hidden + c, lanes));
        const Vec value = load(grad + c, lanes) * gelu.slope;
        store(activation + c, gelu.value, lanes);
        store(grad + c, value, lanes);
        if (sum) add_to(sum + c, value, lanes);
      });
    }
  }
}

inline void gelu_forward(const Gelu& a, int64_t begin, int64_t end) {
  with_number(a.number, [&](auto x) {
    using X = decltype(x);
    a.exact ? gelu_blocks<X, ExactGelu>(a, begin, end) : gelu_blocks<X, TanhGelu>(a, begin, end);
  });
}

inline void gelu_backward(const Gelu& a, int64_t begin, int64_t end) {
  with_number(a.number, [&](auto x) {
    using X = decltype(x);
    a.exact ? gelu_gradients<X, ExactGelu>(a, begin, end)
            : gelu_gradients<X, TanhGelu>(a, begin, end);
  });
}

// out = the sum of rows; tasks are blocks of kSumColumns columns.
inline void sum_rows(const SumRows& a, int64_t begin, int64_t end) {
  const int64_t first = begin * kSumColumns;
  const int64_t last = end * kSumColumns < a.columns ? end * kSumColumns : a.columns;
  by_vector<1>(last - first, [&](int64_t c, auto lanes, int) {
    const Vec total = sum_down(a.rows + first + c, a.count, a.columns, lanes);
    store_as(a.out, a.number, first + c, total, lanes);
  });
}

}  // namespace diffit::DIFFIT_ISA
