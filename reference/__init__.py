"""The oracle: DiffiT's equations, literally, in plain PyTorch and any dtype; float64 for the truth.

Imports nothing of the package it judges. README.md beside this file has the derivations.
"""

from reference.adaln import adaln, adaln_zero_block, layer_norm, modulate
from reference.group_norm import group_norm_silu
from reference.latent import block, guided, latent_diffit, mlp
from reference.sampling import ancestral_sampling
from reference.tmsa import (
    partition_windows,
    position_bias,
    relative_position_index,
    reverse_windows,
    tmsa,
    window_attention,
)

__all__ = [
    "adaln",
    "adaln_zero_block",
    "ancestral_sampling",
    "block",
    "group_norm_silu",
    "guided",
    "latent_diffit",
    "layer_norm",
    "mlp",
    "modulate",
    "partition_windows",
    "position_bias",
    "relative_position_index",
    "reverse_windows",
    "tmsa",
    "window_attention",
]
