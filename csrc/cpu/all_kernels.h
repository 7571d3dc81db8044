// Every kernel, for the instruction set of the file that includes this.
#pragma once

#include "cpu/adaln_backward.h"
#include "cpu/group_norm_backward.h"
#include "cpu/linear.h"
#include "cpu/mlp.h"
#include "cpu/window_attention_backward.h"

namespace diffit::DIFFIT_ISA {

constexpr Kernels all_kernels(const char* name) {
  return {
      name,
      window_attention_forward,
      window_attention_backward,
      adaln_forward,
      adaln_backward,
      adaln_sums,
      linear,
      kPanel,
      gelu_forward,
      gelu_backward,
      sum_rows,
      group_norm_statistics,
      group_norm_merge,
      group_norm_normalise,
      group_norm_sums,
      group_norm_input,
  };
}

}  // namespace diffit::DIFFIT_ISA
