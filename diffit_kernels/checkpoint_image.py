"""What the names and shapes of an image-space DiffiT's state dict tell of its configuration.

No image-space weights of the paper were released, so there is no format that everybody has. Beside
our own names those of an independent implementation are known, and translated.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from diffit_kernels.checkpoint_files import Tensors, listing
from diffit_kernels.image_model import noise_frequencies

# Names of the independent implementation, and ours; every rule is applied, in this order. None of
# them fits a name of ours.
RENAMES = (
    (r"^enc_blocks\.", "encoder."),
    (r"^enc_downs\.", "downsamples."),
    (r"^dec_blocks\.", "decoder."),
    (r"^dec_ups\.", "upsamples."),
    (r"^temb_proj\.1\.net\.", "t_embedder.mlp."),
    (r"^((?:en|de)coder\.\d+\.\d+)\.gn\.", r"\1.norm."),
    (r"^((?:en|de)coder\.\d+\.\d+)\.skip\.", r"\1.shortcut."),
    (r"\.transformer\.tmsa\.qkv_t\.", ".block.attn.qkv_temb."),
    (r"\.transformer\.tmsa\.rpb\.", ".block.attn.relative_position_bias_"),
    (r"\.relative_position_bias_index$", ".relative_position_index"),
    (r"\.transformer\.tmsa\.", ".block.attn."),
    (r"\.transformer\.mlp\.0\.", ".block.mlp.fc1."),
    (r"\.transformer\.mlp\.2\.", ".block.mlp.fc2."),
    (r"\.transformer\.", ".block."),
)
FREQUENCIES = "temb_proj.0.freqs"  # derived, and held by its files alone
THIRD_PARTY = {"num_groups": 8, "norm_eps": 1e-5, "gelu": "none"}  # what its shapes do not tell

UNTOLD = ("image_size", "num_groups", "norm_eps", "gelu")
# What decides the configuration, of the whole and of each stage.
LANDMARKS = {
    "tokenizer.weight": 4,
    "t_embedder.mlp.0.weight": 2,
    "decoder.0.0.norm.weight": 1,
}
STAGE_LANDMARKS = {
    "encoder.{}.0.norm.weight": 1,
    "encoder.{}.0.block.attn.relative_position_bias_table": 2,
    "encoder.{}.0.block.mlp.fc1.weight": 2,
    "decoder.{}.0.norm.weight": 1,
}


def is_image_diffit(names: Iterable[str]) -> bool:
    """Whether a state dict with these names may be an image-space DiffiT's, of either naming."""
    return any(name.startswith("tokenizer.") for name in names)


def translated(tensors: Tensors, saved: dict, path: Path | str) -> tuple[Tensors, dict]:
    """The tensors under our names, and what is known of the configuration beside their shapes.

    ``saved`` is what the file itself says. The independent implementation's files also hold the
    frequencies of its time embedding, which are left out, as ours are derived.

    Raises:
        ValueError: these frequencies are others than 10000^(-i / (T/2)).
    """
    if FREQUENCIES not in tensors.shapes:
        return tensors, saved
    check_frequencies(tensors.load(FREQUENCIES), path)
    return tensors.renamed(our_name), THIRD_PARTY


def check_frequencies(frequencies: Tensor, path: Path | str) -> None:
    """Raise ValueError unless they are 10000^(-i / (T/2)), as far as half precision tells."""
    expected = noise_frequencies(2 * len(frequencies), frequencies.float())
    if not torch.allclose(frequencies.float(), expected, rtol=1e-2):
        raise ValueError(f"{path}: {FREQUENCIES} must be 10000^(-i / (T/2)), got {frequencies}")


def our_name(name: str) -> str | None:
    """The name in :class:`ImageDiffiT` of a tensor of the independent implementation, if any."""
    if name == FREQUENCIES:
        return None
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def infer_config(
    shapes: Mapping[str, tuple[int, ...]],
    path: Path | str = "checkpoint",
    config: Mapping = MappingProxyType({}),
) -> dict:
    """The arguments of :class:`ImageDiffiT` that give these shapes, and those of ``config``.

    Shapes tell all but :data:`UNTOLD`, which ``config`` must have; whatever else it has overrules
    them. ``num_classes`` takes the label table's last row for the null class.

    Raises:
        ValueError: a tensor that decides the configuration is missing or of the wrong rank, or
            ``config`` lacks something.
    """
    if missing := [name for name in UNTOLD if name not in config]:
        raise ValueError(f"{path}: shapes do not tell {missing}, and config= lacks them")
    stages = max(1, _count(shapes, "encoder."))
    of_stages = {
        name.format(i): rank for name, rank in STAGE_LANDMARKS.items() for i in range(stages)
    }
    ranks = {**LANDMARKS, **of_stages}
    wrong = [name for name, rank in ranks.items() if len(shapes.get(name, ())) != rank]
    if wrong:
        raise ValueError(
            f"{path} is no image-space DiffiT: it lacks {listing(wrong)} (or has them in another "
            f"rank); it has {listing(sorted(shapes))}"
        )
    norms, tables, hidden, _ = (
        [shapes[name.format(i)] for i in range(stages)] for name in STAGE_LANDMARKS
    )
    channels = [width for (width,) in norms]
    mlp_ratio = hidden[0][0] / channels[0]
    if int(channels[0] * mlp_ratio) != hidden[0][0]:  # the quotient was rounded down
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    labels = shapes.get("y_embedder.embedding_table.weight")
    joined = stages == 1 or shapes["decoder.1.0.norm.weight"] == (2 * channels[-2],)
    return {
        "in_channels": shapes["tokenizer.weight"][1],
        "channels": channels,
        "num_cells": [_count(shapes, f"encoder.{i}.") for i in range(stages)],
        "window_size": [(math.isqrt(rows) + 1) // 2 for rows, _ in tables],
        "num_heads": [heads for _, heads in tables],
        "mlp_ratio": mlp_ratio,
        "temb_size": shapes["t_embedder.mlp.0.weight"][1],
        "temb_bias": "encoder.0.0.block.attn.qkv_temb.bias" in shapes,
        "norm_affine": "encoder.0.0.block.norm1.weight" in shapes,
        "skip": "concatenate" if joined else "add",
        "head_norm": "head_norm.weight" in shapes,
        "num_classes": None if labels is None else labels[0] - 1,
        **config,
    }


def _count(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> int:
    """How many numbers follow ``prefix``."""
    start = len(prefix)
    return len({name[start:].split(".")[0] for name in shapes if name.startswith(prefix)})
