"""What the shapes of a latent DiffiT's state dict, or a DiT's, tell of its configuration."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from diffit_kernels.checkpoint_files import listing

# What decides the configuration; a file without one of these is none.
LANDMARKS = {
    "pos_embed": 3,
    "x_embedder.proj.weight": 4,
    "y_embedder.embedding_table.weight": 2,
    "blocks.0.mlp.fc1.weight": 2,
    "final_layer.linear.weight": 2,
}
TABLE = "blocks.0.attn.relative_position_bias_table"
TIME_TOKEN = "blocks.0.attn.qkv_temb.weight"
MODULATION = "blocks.0.adaLN_modulation.1.weight"
DIT_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by width; without a table no shape tells


def infer_config(
    shapes: Mapping[str, tuple[int, ...]],
    path: Path | str = "checkpoint",
    config: Mapping = MappingProxyType({}),
) -> dict:
    """The constructor arguments of :class:`DiffiT` that give these shapes.

    ``num_classes`` takes the last row of the label table for the null class. Without a position
    bias no shape tells the heads: they are those of the published DiT of this width, unless
    ``config`` has "num_heads". Whatever else it has overrules what the shapes tell.

    Raises:
        ValueError: a tensor that decides the configuration is missing or of the wrong rank, or
            ``config`` lacks the heads.
    """
    wrong = [
        name
        for name, rank in LANDMARKS.items()
        if len(shapes.get(name, ())) != rank or 0 in shapes[name]
    ]
    wrong += [TABLE] if TABLE in shapes and len(shapes[TABLE]) != 2 else []
    wrong += [] if TIME_TOKEN in shapes or MODULATION in shapes else [TIME_TOKEN]
    if wrong:
        raise ValueError(
            f"{path} is no latent DiffiT: it lacks {listing(wrong)} (or has them in another rank); "
            f"it has {listing(sorted(shapes))}"
        )
    _, tokens, hidden_size = shapes["pos_embed"]
    _, in_channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"{path}: pos_embed must have a square number of tokens, got {tokens}")
    out_channels = shapes["final_layer.linear.weight"][0] // patch_size**2
    mlp_hidden = shapes["blocks.0.mlp.fc1.weight"][0]
    mlp_ratio = mlp_hidden / hidden_size
    if int(hidden_size * mlp_ratio) != mlp_hidden:  # the quotient was rounded down
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    blocks = {name.split(".")[1] for name in shapes if re.match(r"blocks\.\d+\.", name)}
    return {
        "input_size": side * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": len(blocks),
        "num_heads": _num_heads(shapes, hidden_size, config, path),
        "mlp_ratio": mlp_ratio,
        "num_classes": shapes["y_embedder.embedding_table.weight"][0] - 1,
        "learn_sigma": out_channels != in_channels,
        "conditioning": _conditioning(shapes),
        "position_bias": TABLE in shapes,
        **config,
    }


def _conditioning(shapes: Mapping[str, tuple[int, ...]]) -> str:
    if MODULATION not in shapes:
        return "tmsa"
    return "tmsa+adaln" if TIME_TOKEN in shapes else "adaln_zero"


def _num_heads(
    shapes: Mapping[str, tuple[int, ...]], hidden_size: int, config: Mapping, path: Path | str
) -> int:
    """As given, else from the bias table, else DiT's of this width."""
    if "num_heads" in config:
        return config["num_heads"]
    heads = shapes[TABLE][1] if TABLE in shapes else DIT_HEADS.get(hidden_size)
    if heads is None:
        raise ValueError(
            f"{path} has no position bias that would tell its heads, and is no DiT of a published "
            f"width ({', '.join(map(str, DIT_HEADS))}), but of {hidden_size}: give "
            'config={"num_heads": ...}'
        )
    return heads
