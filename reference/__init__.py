"""The oracle: DiffiT's equations, literally, in plain PyTorch and any dtype; float64 for the truth.

Imports nothing of the package it judges. README.md beside this file has the derivations.
"""

from reference.adaln import adaln, layer_norm, modulate
from reference.edm import denoised, edm_loss, heun_sampling, preconditioning, sigma_schedule
from reference.group_norm import group_norm, group_norm_silu
from reference.image import image_diffit
from reference.latent import block, final_layer, guided, latent_diffit, mlp
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
    "ancestral_sampling",
    "block",
    "denoised",
    "edm_loss",
    "final_layer",
    "group_norm",
    "group_norm_silu",
    "guided",
    "heun_sampling",
    "image_diffit",
    "latent_diffit",
    "layer_norm",
    "mlp",
    "modulate",
    "partition_windows",
    "position_bias",
    "preconditioning",
    "relative_position_index",
    "reverse_windows",
    "sigma_schedule",
    "tmsa",
    "window_attention",
]
