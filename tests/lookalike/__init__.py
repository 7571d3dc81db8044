"""Models with the structure of those that users have, and none of their code.

Not built from the package's modules: other class names, buffers that are kept, dropouts and idle
parts, and arguments as users' models give them. The names of parts are those that checkpoints have.
"""

from tests.lookalike import dit, image_unet, mdt, swin
from tests.lookalike.diffit import Attention, GatedLayer, Layer, Mlp, SineAttention, Transformer

__all__ = [
    "Attention",
    "GatedLayer",
    "Layer",
    "Mlp",
    "SineAttention",
    "Transformer",
    "dit",
    "image_unet",
    "mdt",
    "swin",
]
