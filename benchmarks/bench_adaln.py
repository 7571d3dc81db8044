"""LayerNorm alone, with its modulation, and with the gated residual before it as well.

The plain one has weight and bias, for libraries' norms have them; ours take them or not.
"""

import pytest
import torch
import torch.nn.functional as F

import reference
from benchmarks import peers
from benchmarks.race import (
    DEVICE,
    DIRECTIONS,
    DTYPES,
    REPLAYED,
    backends,
    literally,
    moved_bytes,
    provider,
)
from diffit_kernels.ops import adaln

pytestmark = REPLAYED
BATCH, TOKENS, CHANNELS = (64 if DEVICE == "cuda" else 4), 256, 1152
EPS = 1e-6
CASES = {  # name: what there is beside x
    "LN": ("weight", "bias"),
    "modulated": ("shift", "scale"),
    "residual, modulated": ("y", "gate", "shift", "scale"),
}
SIZES = {
    **dict.fromkeys(("x", "y"), (BATCH, TOKENS, CHANNELS)),
    **dict.fromkeys(("gate", "shift", "scale"), (BATCH, CHANNELS)),
    **dict.fromkeys(("weight", "bias"), (CHANNELS,)),
}
FUSED = {f"fused, {name}": name for name in backends("adaln")}
PROVIDERS = [*peers.with_compiled_names("literal"), *peers.LAYER_NORMS, *FUSED]
WITHOUT_PRODUCTS = [name for name in DTYPES if name != "tf32"]


def literal(x, y=None, gate=None, shift=None, scale=None, weight=None, bias=None):
    x = x if y is None else x + gate[:, None] * y
    out = F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
    if scale is not None:
        out = out * (1 + scale[:, None]) + shift[:, None]
    return out if y is None else (x, out)


def oracle(x, **others):
    residual, out = reference.adaln(x, **others, eps=EPS)
    return (residual, out) if "y" in others else out


def tensors(case, dtype, new):
    """The inputs of a case and its outputs, made by ``new(size, dtype=, device=)``."""
    names = ("x", *CASES[case])
    outputs = ("x", "x") if "y" in names else ("x",)
    return [[new(SIZES[n], dtype=DTYPES[dtype]) for n in part] for part in (names, outputs)]


def make(case, direction, dtype):
    """All providers of a case by name."""
    train = direction != "forward"
    torch.manual_seed(0)
    with torch.device(DEVICE):
        inputs, cotangents = tensors(case, dtype, torch.randn)
    cotangents = cotangents if train else None
    inputs = [t.requires_grad_(train) for t in inputs]

    def by_name(function):
        return lambda *inputs: function(**dict(zip(("x", *CASES[case]), inputs, strict=True)))

    expected = literally(by_name(oracle), inputs, cotangents)

    def peer(function):
        return provider(by_name(function), inputs, cotangents, expected)

    def library(name):
        if case != "LN":
            return f"{name} has no modulated LayerNorm"
        norm = peers.layer_norm(name, EPS, train)
        if isinstance(norm, str):
            return norm
        x, *affine = inputs
        affine = [t.float() for t in affine] if name == "Quack" else affine  # as it likes them
        return provider(by_name(norm), (x, *affine), cotangents, expected)

    def fused(backend):
        def function(**named):
            return adaln(**named, eps=EPS, backend=backend)

        return provider(by_name(function), inputs, cotangents, expected, "ours", backend=backend)

    return {
        **peers.with_compiled("literal", literal, peer),
        **{name: library(name) for name in peers.LAYER_NORMS},
        **{name: fused(backend) for name, backend in FUSED.items()},
    }


@pytest.mark.parametrize("provider", peers.parameters(PROVIDERS))
@pytest.mark.parametrize("dtype", peers.parameters(WITHOUT_PRODUCTS, full=["bfloat16"]))
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("form", CASES)
def bench_adaln(race, form, direction, dtype, provider):
    with torch.device("meta"):
        inputs, outputs = tensors(form, dtype, torch.empty)
    race(
        lambda: make(form, direction, dtype),
        sizes={"batch": BATCH, "tokens": TOKENS, "channels": CHANNELS},
        moved=moved_bytes(inputs, outputs, direction != "forward"),
        queued=True,
    )
