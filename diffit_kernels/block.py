"""The transformer block of every DiffiT, latent or image-space, and its parts.

The letters: B batch; N tokens (H · W of the grid); C channels; T width of the time token; nH heads;
d = C / nH head_dim; h × w window.
"""

import torch
from torch import Tensor, nn

from diffit_kernels import fused
from diffit_kernels.positions import (
    partition_windows,
    relative_position_index,
    reverse_windows,
)

CONDITIONINGS = ("tmsa", "adaln_zero", "tmsa+adaln")
GELU_FORMS = ("tanh", "none")


class DiffiTBlock(nn.Module):
    """x̂ = x + TMSA(LN(x), temb);  x = x̂ + MLP(LN(x̂))  (eqs. 7 and 8).

    With ``conditioning="adaln_zero"`` the time token modulates the norms instead, as in DiT
    (arXiv 2212.09748), and with "tmsa+adaln" both::

        (shift, scale, gate) × 2 = Linear(SiLU(temb))
        x̂ = x + gate₁ · Attn(LN(x) (1 + scale₁) + shift₁);  x = x̂ + gate₂ · MLP(...)

    Args:
        hidden_size: C. num_heads: nH. mlp_ratio: hidden width of the MLP / C.
        window_size: side of the attention's windows, or (h, w).
        conditioning: "tmsa", "adaln_zero" or "tmsa+adaln".
        temb_size: T; default C.
        temb_bias: whether the time token's projection to q, k and v has a bias.
        position_bias: whether the attention has a relative position bias table.
        norm_affine, norm_eps: of both LayerNorms.
        gelu: "tanh", or "none" for the exact GELU.

    Raises:
        ValueError: an unknown ``conditioning`` or ``gelu``.
    """

    use_fused_tmsa = False
    backend: str | None = None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        window_size: int | tuple[int, int],
        mlp_ratio: float = 4.0,
        *,
        conditioning: str = "tmsa",
        temb_size: int | None = None,
        temb_bias: bool = True,
        position_bias: bool = True,
        norm_affine: bool = False,
        norm_eps: float = 1e-6,
        gelu: str = "tanh",
    ):
        super().__init__()
        check_choice("conditioning", conditioning, CONDITIONINGS)
        temb_size = hidden_size if temb_size is None else temb_size
        self.norm1 = nn.LayerNorm(hidden_size, eps=norm_eps, elementwise_affine=norm_affine)
        self.attn = TimeDependentAttention(
            hidden_size,
            num_heads,
            window_size,
            temb_size=temb_size if conditioning != "adaln_zero" else None,
            temb_bias=temb_bias,
            position_bias=position_bias,
        )
        self.norm2 = nn.LayerNorm(hidden_size, eps=norm_eps, elementwise_affine=norm_affine)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), gelu)
        self.adaLN_modulation = (
            None if conditioning == "tmsa" else AdaLNModulation(temb_size, 6 * hidden_size)
        )

    def forward(self, x: Tensor, temb: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """(B, N, C), (B, T) -> (B, N, C), tokens of ``grid`` row by row; default one window."""
        if self.use_fused_tmsa:
            return fused.block(self.parts(temb, grid), x, temb, backend=self.backend)
        if self.adaLN_modulation is None:
            x = x + self.attn(self.norm1(x), temb, grid)
            return x + self.mlp(self.norm2(x))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(temb).chunk(6, -1)
        h = modulate(self.norm1(x), shift1, scale1)
        x = x + gate1[:, None] * self.attn(h, temb, grid)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))

    def parts(
        self,
        temb: Tensor | None,
        grid: tuple[int, int] | None = None,
        time_parts: Tensor | None = None,
    ) -> fused.BlockParts:
        """What the fused forward takes the block apart into, for one time token and grid.

        With ``time_parts`` the attention has these, and its own ``forward`` is not called: see
        :func:`diffit_kernels.fused.attention`.
        """

        def attend(h: Tensor) -> Tensor:
            if time_parts is None:
                return self.attn(h, temb, grid)
            backend = self.attn.backend
            return fused.attention(
                self.attn.parts(), h, None, grid, time_parts=time_parts, backend=backend
            )

        return fused.BlockParts(self.norm1, attend, self.norm2, self.mlp, self.adaLN_modulation)


class TimeDependentAttention(nn.Module):
    """TMSA over non-overlapping windows (eqs. 3 to 6): the time token adds to every q, k and v.

    The published state dict holds an (L, L) index of the bias table in every block. Here it is
    derived where it is asked for, by ``state_dict`` and strict loading, and never kept.

    Args:
        hidden_size: C. num_heads: nH. window_size: side of the windows, or (h, w).
        temb_size: T; None for an attention without a time token.
        temb_bias: whether the time token's projection has a bias.
        position_bias: whether there is a relative position bias table.
    """

    use_fused_tmsa = False
    backend: str | None = None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        window_size: int | tuple[int, int],
        *,
        temb_size: int | None,
        temb_bias: bool = True,
        position_bias: bool = True,
    ):
        super().__init__()
        h, w = (window_size, window_size) if isinstance(window_size, int) else window_size
        self.num_heads = num_heads
        self.window_size = (h, w)
        self.scale = (hidden_size // num_heads) ** -0.5
        table = torch.zeros((2 * h - 1) * (2 * w - 1), num_heads)
        self.relative_position_bias_table = nn.Parameter(table) if position_bias else None
        self.qkv_temb = (
            None if temb_size is None else nn.Linear(temb_size, 3 * hidden_size, bias=temb_bias)
        )
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, temb: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """(B, N, C), (B, T) -> (B, N, C), tokens of ``grid`` row by row; default one window."""
        if self.use_fused_tmsa:
            return fused.attention(self.parts(), x, temb, grid, backend=self.backend)
        grid = self.window_size if grid is None else grid
        q, k, v = self.heads(x, temb, grid)
        scores = q * self.scale @ k.mT
        if (bias := self.position_bias()) is not None:
            scores = scores + bias
        return self.joined(scores.softmax(-1).to(v.dtype) @ v, grid)

    def heads(self, x: Tensor, temb: Tensor, grid: tuple[int, int]) -> tuple[Tensor, ...]:
        """q, k and v with the time token, (B · windows, nH, L, d) each."""
        qkv = self.qkv(x)
        if self.qkv_temb is not None:
            qkv = qkv + self.qkv_temb(temb)[:, None]
        if grid != self.window_size:
            qkv = partition_windows(qkv, grid, self.window_size)
        windows, tokens, channels3 = qkv.shape
        head_dim = channels3 // (3 * self.num_heads)
        qkv = qkv.view(windows, tokens, 3, self.num_heads, head_dim)
        return qkv.permute(2, 0, 3, 1, 4).unbind()

    def position_bias(self) -> Tensor | None:
        """B, (nH, L, L), gathered from the table."""
        if (table := self.relative_position_bias_table) is None:
            return None
        return table[relative_position_index(self.window_size, table.device)].permute(2, 0, 1)

    def joined(self, out: Tensor, grid: tuple[int, int]) -> Tensor:
        """The projection of all heads' results, (B · windows, nH, L, d) -> (B, N, C)."""
        out = out.transpose(1, 2).flatten(2)
        if grid != self.window_size:
            out = reverse_windows(out, grid, self.window_size)
        return self.proj(out)

    def parts(self) -> fused.AttentionParts:
        """What the fused forward takes the attention apart into."""
        return fused.AttentionParts(
            self.qkv,
            self.qkv_temb,
            self.proj,
            self.relative_position_bias_table,
            self.num_heads,
            self.window_size,
            self.scale,
        )

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (table := self.relative_position_bias_table) is not None:
            index = relative_position_index(self.window_size, table.device)
            destination[prefix + "relative_position_index"] = index

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ):
        # The base class reports entries that are neither parameter nor buffer as unexpected.
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )
        if self.relative_position_bias_table is None:
            return
        key = prefix + "relative_position_index"
        index = state_dict.get(key)
        if index is None:
            missing.append(key)
        elif index.device.type != "meta":
            expected = relative_position_index(self.window_size, index.device)
            if index.shape != expected.shape:
                errors.append(
                    f"{key}: shape {tuple(index.shape)}, expected {tuple(expected.shape)}"
                )
            elif not torch.equal(index.to(expected.dtype), expected):
                errors.append(f"{key}: not the index of a row-major {self.window_size} window")
        if key in unexpected:
            unexpected.remove(key)


class AdaLNModulation(nn.Sequential):
    """(B, T) -> (B, k · C): Linear(SiLU(temb)), shifts, scales and gates side by side."""

    def __init__(self, temb_size: int, width: int):
        super().__init__(nn.SiLU(), nn.Linear(temb_size, width))


class Mlp(nn.Module):
    """fc2(GELU(fc1(x)))."""

    def __init__(self, in_features: int, hidden_features: int, gelu: str = "tanh"):
        super().__init__()
        check_choice("gelu", gelu, GELU_FORMS)
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = nn.GELU(approximate=gelu)
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift; x (B, N, C), shift and scale (B, C)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
