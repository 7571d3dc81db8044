"""The fused ops, in data-flow order; one folder each."""

from diffit_kernels.ops.adaln import adaln
from diffit_kernels.ops.group_norm import group_norm_silu
from diffit_kernels.ops.linear import linear
from diffit_kernels.ops.mlp import mlp
from diffit_kernels.ops.time_projection import time_projection, time_projections
from diffit_kernels.ops.window_attention import window_attention

__all__ = [
    "group_norm_silu",
    "adaln",
    "linear",
    "time_projection",
    "time_projections",
    "window_attention",
    "mlp",
]
