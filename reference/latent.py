"""The latent DiffiT as a function of its state dict: eqs. 7 and 8 around eq. 6, and guidance.

Conditioned as its parameters say: by the time token in the attention, by adaLN-Zero (DiT, arXiv
2212.09748), or by both.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.adaln import adaln, layer_norm
from reference.tmsa import tmsa


def latent_diffit(
    state: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor, num_heads: int
) -> Tensor:
    """ε and variance of noisy latents x (B, c, S, S) at timesteps t (B,) for labels y (B,).

    Everything else is read from the shapes of ``state``, a published state dict in any dtype.
    """
    batch, _, size, _ = x.shape
    patch = state["x_embedder.proj.weight"].shape[-1]
    side = size // patch
    x = F.conv2d(
        x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=patch
    )  # (B, C, side, side)
    x = x.permute(0, 2, 3, 1) + state["pos_embed"].reshape(1, side, side, -1)
    c = time_embedding(state, t) + state["y_embedder.embedding_table.weight"][y]
    depth = sum(name.endswith("attn.qkv.weight") for name in state)
    for index in range(depth):
        x = block(x, c, _under(state, f"blocks.{index}."), num_heads, (side, side))
    x = final_layer(x, c, _under(state, "final_layer."))
    out_channels = x.shape[-1] // patch**2
    x = x.reshape(batch, side, side, patch, patch, out_channels)
    return torch.einsum("bhwpqc->bchpwq", x).reshape(batch, out_channels, size, size)


def block(
    x: Tensor,
    c: Tensor,
    parameters: dict[str, Tensor],
    num_heads: int,
    window_size: tuple[int, int],
) -> Tensor:
    """x̂ = x + TMSA(LN(x), c);  x = x̂ + MLP(LN(x̂))  (eqs. 7 and 8); x (B, H, W, C), c (B, T).

    With a modulation, (shift, scale, gate) × 2 = Linear(SiLU(c)):
    x += gate · f(LN(x)(1 + scale) + shift), f the attention, then the MLP.
    """
    shift1 = scale1 = gate1 = shift2 = scale2 = gate2 = None
    if "adaLN_modulation.1.weight" in parameters:
        modulation = _modulation(c, parameters)[:, None, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)
    _, h = adaln(x, shift1, scale1)
    branch = tmsa(h, c, _under(parameters, "attn."), num_heads, window_size)
    x, h = adaln(x, shift2, scale2, y=branch, gate=gate1)
    branch = mlp(h, _under(parameters, "mlp."))
    return x + (branch if gate2 is None else gate2 * branch)


def final_layer(x: Tensor, c: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """Linear(SiLU(LN(x))); with a modulation Linear(LN(x)(1 + scale) + shift). x (B, H, W, C)."""
    if "adaLN_modulation.1.weight" in parameters:
        shift, scale = _modulation(c, parameters)[:, None, None].chunk(2, -1)
        x = adaln(x, shift, scale)[1]
    else:
        x = F.silu(layer_norm(x))
    return F.linear(x, parameters["linear.weight"], parameters["linear.bias"])


def _modulation(c: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    names = (f"adaLN_modulation.1.{name}" for name in ("weight", "bias"))
    return F.linear(F.silu(c), *(parameters[name] for name in names))


def mlp(x: Tensor, parameters: dict[str, Tensor], approximate: str = "tanh") -> Tensor:
    """W2 GELU(W1 x + b1) + b2; tanh form: ½ h (1 + tanh(√(2/π) (h + 0.044715 h³)))."""
    h = x @ parameters["fc1.weight"].T + parameters["fc1.bias"]
    if approximate == "tanh":
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    else:
        h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    return h @ parameters["fc2.weight"].T + parameters["fc2.bias"]


def time_embedding(state: dict[str, Tensor], t: Tensor) -> Tensor:
    """[cos(t ω) | sin(t ω)], ω_i = 10000^(-i/128), through Linear-SiLU-Linear; features in float32.

    Float32 features are part of the published model: a float64 run starts from the same ones.
    """
    omega = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = t.float()[:, None] * omega
    h = torch.cat((torch.cos(angles), torch.sin(angles)), 1).to(state["pos_embed"].dtype)
    h = F.linear(h, state["t_embedder.mlp.0.weight"], state["t_embedder.mlp.0.bias"])
    return F.linear(F.silu(h), state["t_embedder.mlp.2.weight"], state["t_embedder.mlp.2.bias"])


def guided(
    prediction: Tensor, t: Tensor, scale: float, input_size: int, power: float = 4.0
) -> Tensor:
    """Guidance of a prediction (2B, c, S, S) for [conditional; null], in its first three channels.

    ε = ε_null + w (ε_cond - ε_null), w = (s - 1) ½ (1 - cos(π (1 - t/1000)^power)) + 1, or w = s
    for latents of more than 32 a side.
    """
    conditional, null = prediction[:, :3].chunk(2)
    weight = torch.full(t.shape, scale, dtype=prediction.dtype)
    if input_size <= 32:
        progress = (1 - t.to(prediction.dtype) / 1000) ** power
        weight = (scale - 1) * 0.5 * (1 - torch.cos(math.pi * progress)) + 1
    guided = null + weight[: len(null), None, None, None] * (conditional - null)
    return torch.cat((torch.cat((guided, guided)), prediction[:, 3:]), 1)


def _under(parameters: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in parameters.items()
        if name.startswith(prefix)
    }
