"""Implementations that are not ours, and the reason why one is missing here.

Attention takes q, k and v by head, (B, nH, L, d), unless said otherwise, and returns out likewise.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.measure import DEVICE
from benchmarks.race import Provider

# Not "max-autotune": its CUDA graphs copy every input that is no module's parameter, and save only
# the host's time, which is left out of a single op's durations anyway.
AUTOTUNED = "max-autotune-no-cudagraphs"
SDPA_BACKENDS = {
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
}
FLASH_ATTENTION = {  # name: (module, how to get it)
    "FlashAttention 2": ("flash_attn", "pip install flash-attn"),
    "FlashAttention 3": ("flash_attn_interface", "build hopper/ of Dao-AILab/flash-attention"),
    "FlashAttention 4": ("flash_attn.cute", "pip install flash-attn-4"),
}
LAYER_NORMS = {
    "Liger": ("liger_kernel.ops.layer_norm", "pip install liger-kernel"),
    "Apex": ("apex.normalization.fused_layer_norm", "build NVIDIA/apex"),
    "Quack": ("quack.rmsnorm", "pip install quack-kernels"),
}


def parameters(names: Iterable[str], full: Iterable[str] = ()) -> list:
    """Values of an entry's parameter, of which a CPU leaves those in ``full`` to ``--full``, and of
    providers those that are autotuned."""
    full = [*full, *(name for name in names if name.endswith("max-autotune"))]
    marks = {name: pytest.mark.full for name in full if DEVICE == "cpu"}
    return [pytest.param(name, marks=marks.get(name, ())) for name in names]


def compiled(function: Callable, mode: str | None = None) -> Callable:
    """By Inductor, for exactly the shapes that it is given."""
    return torch.compile(function, mode=mode, dynamic=False)


def with_compiled_names(name: str) -> list[str]:
    """The keys of :func:`with_compiled`."""
    return [name, f"{name}, torch.compile", f"{name}, max-autotune"]


def with_compiled(
    name: str, function: Callable, enter: Callable[[Callable], Provider]
) -> dict[str, Provider]:
    """A function as it is and compiled in two modes; ``enter`` makes a provider of each."""
    modes = (function, compiled(function), compiled(function, AUTOTUNED))
    return dict(zip(with_compiled_names(name), map(enter, modes), strict=True))


def literal(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q kᵀ / √d + bias) v, with (B, nH, L, L) scores in memory."""
    return (q * q.shape[-1] ** -0.5 @ k.mT + bias).softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """By the kernel that torch chooses; bias (1, nH, L, L) or None."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def sdpa_by(backend: str) -> Callable[..., Tensor] | str:
    """:func:`sdpa` by one of :data:`SDPA_BACKENDS`, or why not; it raises for what that lacks."""
    if DEVICE == "cpu" and backend in ("efficient", "cuDNN"):
        return "a CUDA kernel"
    if DEVICE == "cpu" and backend == "flash":
        return "the same as SDPA's own choice on a CPU"

    def attention(q, k, v, bias=None):
        with sdpa_kernel(SDPA_BACKENDS[backend]):
            return sdpa(q, k, v, bias)

    return attention


def flex(side: int, train: bool) -> Callable[..., Tensor] | str:
    """FlexAttention of ``side`` × ``side`` windows: ``attention(q, k, v, table)``, compiled.

    A score's bias is looked up in the table, (rows, nH), by its row and column difference, so
    nothing is expanded and the table gets its gradient inside.
    """
    if DEVICE == "cpu" and train:
        return "FlexAttention has no backward on a CPU"

    def attention(q, k, v, table):
        def add_bias(score, batch, head, query, key):
            row = query // side - key // side + side - 1
            column = query % side - key % side + side - 1
            return score + table[row * (2 * side - 1) + column, head]

        return flex_attention(q, k, v, score_mod=add_bias)

    return compiled(attention)


def flash_attention(name: str, dtype: torch.dtype) -> Callable[..., Tensor] | str:
    """One of :data:`FLASH_ATTENTION`, without a bias, of (B, L, nH, d); or why not."""
    module, source = FLASH_ATTENTION[name]
    if reason := missing(name, module, source):
        return reason
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{name} takes half precision"

    def attention(q, k, v):
        out = imported(module, "flash_attn_func")(q, k, v)
        return out[0] if isinstance(out, tuple) else out  # with the log-sum-exp, in some versions

    return attention


def layer_norm(name: str, eps: float, train: bool) -> Callable[..., Tensor] | str:
    """One of :data:`LAYER_NORMS`: ``norm(x, weight, bias)`` of (B, N, C) and (C,); or why not.

    Quack takes weight and bias in float32 only.
    """
    module, source = LAYER_NORMS[name]
    if reason := missing(name, module, source):
        return reason
    if name == "Quack" and train:
        return "Quack has no backward of a LayerNorm"

    def liger(x, weight, bias):
        return imported(module, "LigerLayerNormFunction").apply(x, weight, bias, eps)

    def apex(x, weight, bias):
        affine = imported(module, "fused_layer_norm_affine")
        return affine(x, weight, bias, x.shape[-1:], eps)

    def quack(x, weight, bias):
        out = imported(module, "layernorm_fwd")(x.flatten(0, 1), weight, bias, eps=eps)
        return out.view(x.shape)

    return {"Liger": liger, "Apex": apex, "Quack": quack}[name]


def missing(name: str, module: str, source: str) -> str | None:
    """Why a package's module cannot be used: it is not installed; None if it is.

    One that is there and cannot be imported fails when it is first called, and its row says how.
    """
    found = importlib.util.find_spec(module.partition(".")[0])
    return None if found else f"{name} is not installed: {source}"


@functools.cache
def imported(module: str, name: str) -> Callable:
    """A function of a package that may be missing, imported when it is first called."""
    return getattr(importlib.import_module(module), name)
