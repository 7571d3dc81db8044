"""The image-space DiffiT as a function of its state dict: the cells of eqs. 9 and 10 in a U."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.adaln import layer_norm
from reference.group_norm import group_norm, group_norm_silu
from reference.latent import mlp
from reference.tmsa import tmsa


def image_diffit(
    state: dict[str, Tensor],
    x: Tensor,
    c_noise: Tensor,
    y: Tensor | None = None,
    *,
    num_groups: int = 8,
    approximate: str = "tanh",
    eps: float = 1e-5,
) -> Tensor:
    """F(x; c_noise, y) of images x (B, c, S, S) at noise levels c_noise (B,), for labels y (B,).

    Everything else is read from the names and shapes of ``state``, in any dtype. From stage to
    stage the side is halved by a convolution of stride 2 and doubled by a transposed one; what
    leaves an encoder stage meets the decoder at the same side, joined where its first cell takes
    both, else added.
    """
    form = {"num_groups": num_groups, "eps": eps}
    c = noise_embedding(state, c_noise)
    if y is not None:
        c = c + state["y_embedder.embedding_table.weight"][y]
    h = convolution(x.permute(0, 2, 3, 1), _under(state, "tokenizer."))  # (B, H, W, C)
    left = []
    for stage, cells in enumerate(_numbered(state, "encoder")):
        if stage > 0:
            left.append(h)
            h = convolution(h, _under(state, f"downsamples.{stage - 1}."), stride=2)
        for parameters in _numbered(cells):
            h = cell(h, c, parameters, approximate, **form)
    for stage, cells in enumerate(_numbered(state, "decoder")):
        if stage > 0:
            h, skip = double_the_side(h, _under(state, f"upsamples.{stage - 1}.")), left.pop()
            joined = len(cells["0.norm.weight"]) == 2 * h.shape[-1]
            h = torch.cat((h, skip), -1) if joined else h + skip
        for parameters in _numbered(cells):
            h = cell(h, c, parameters, approximate, **form)
    if "head_norm.weight" in state:
        h = group_norm(h, state["head_norm.weight"], state["head_norm.bias"], **form)
    return convolution(h, _under(state, "head.")).permute(0, 3, 1, 2)


def cell(
    x: Tensor,
    c: Tensor,
    parameters: dict[str, Tensor],
    approximate: str,
    *,
    num_groups: int,
    eps: float,
) -> Tensor:
    """x̂ = Conv3x3(SiLU(GroupNorm(x)));  Block(x̂, c) + x  (eqs. 9 and 10); x (B, H, W, C), c (B, T).

    Where the cell changes the number of channels, x is taken through a matrix first.
    """
    weight, bias = parameters["norm.weight"], parameters["norm.bias"]
    h = group_norm_silu(x, weight, bias, num_groups=num_groups, eps=eps)
    h = convolution(h, _under(parameters, "conv."))
    h = block(h, c, _under(parameters, "block."), approximate, eps)
    if "shortcut.weight" in parameters:
        x = x @ parameters["shortcut.weight"][:, :, 0, 0].T
    return h + x


def block(
    x: Tensor, c: Tensor, parameters: dict[str, Tensor], approximate: str, eps: float
) -> Tensor:
    """x̂ = x + TMSA(LN(x), c);  x = x̂ + MLP(LN(x̂))  (eqs. 7 and 8), in square windows.

    The LayerNorms' affine parameters and the bias of the time token's projection may be missing.
    """
    rows, num_heads = parameters["attn.relative_position_bias_table"].shape
    window = (math.isqrt(rows) + 1) // 2  # rows = (2 window - 1)²
    affine1, affine2 = (
        (parameters.get(f"{norm}.weight"), parameters.get(f"{norm}.bias"))
        for norm in ("norm1", "norm2")
    )
    attention = _under(parameters, "attn.")
    x = x + tmsa(layer_norm(x, *affine1, eps), c, attention, num_heads, (window, window))
    return x + mlp(layer_norm(x, *affine2, eps), _under(parameters, "mlp."), approximate)


def noise_embedding(state: dict[str, Tensor], c_noise: Tensor) -> Tensor:
    """[sin(c ω) | cos(c ω)], ω_i = 10000^(-i / (T/2)), through Linear-SiLU-Linear: (B, T)."""
    weight = state["t_embedder.mlp.0.weight"]
    half = weight.shape[1] // 2
    omega = 10000 ** (-torch.arange(half, dtype=weight.dtype) / half)
    angles = c_noise.to(weight.dtype)[:, None] * omega
    h = torch.cat((torch.sin(angles), torch.cos(angles)), 1)
    h = F.linear(h, weight, state["t_embedder.mlp.0.bias"])
    return F.linear(F.silu(h), state["t_embedder.mlp.2.weight"], state["t_embedder.mlp.2.bias"])


def convolution(x: Tensor, parameters: dict[str, Tensor], stride: int = 1) -> Tensor:
    """3 × 3, zeros outside; x (B, H, W, C)."""
    x = x.permute(0, 3, 1, 2)
    out = F.conv2d(x, parameters["weight"], parameters["bias"], stride=stride, padding=1)
    return out.permute(0, 2, 3, 1)


def double_the_side(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """The transpose of a 4 × 4 convolution of stride 2 with one row of zeros around its input."""
    x = x.permute(0, 3, 1, 2)
    out = F.conv_transpose2d(x, parameters["weight"], parameters["bias"], stride=2, padding=1)
    return out.permute(0, 2, 3, 1)


def _under(parameters: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in parameters.items()
        if name.startswith(prefix)
    }


def _numbered(parameters: dict[str, Tensor], prefix: str = "") -> list[dict[str, Tensor]]:
    """What lies under ``prefix``.0, ``prefix``.1 and so on, one dict for each number."""
    start = f"{prefix}." if prefix else ""
    parts = []
    while found := _under(parameters, f"{start}{len(parts)}."):
        parts.append(found)
    return parts
