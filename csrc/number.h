#pragma once

namespace diffit {

// The numbers of an activation. Parameters and what is summed over many tokens are float32 on a
// CPU.
enum class Number { kFloat32, kBFloat16, kFloat16 };

}  // namespace diffit
