"""LayerNorm with adaptive modulation, and the gated residual that leads to it, in one op."""

import torch
from torch import Tensor

from diffit_kernels.dispatch import FusedOp
from diffit_kernels.ops.checks import check_activation, check_tensor


def adaln(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """adaLN as in DiT, with the residual before it; every part but the norm is optional.

    ::

        x   <- x + gate · y
        out  = LN(x) (1 + scale) + shift        LN(x) = (x - mean) / sqrt(var + eps) · weight + bias

    DiffiT's released blocks use it plain (LN alone, eqs. 7-8) and with ``y`` (the residual).

    Args:
        x: (B, N, C), the residual stream; float64, float32, bfloat16 or float16.
        shift, scale: (B, C) per sample or (B, N, C) per token, or None.
        y: (B, N, C), the branch to add first, or None.
        gate: like ``shift``; needs ``y``. These four may be of another dtype than ``x``, as under
            autocast: float32, bfloat16 or float16 unless ``x`` is float64.
        weight, bias: (C,), the LayerNorm's affine parameters, or None; dtype of ``x`` or float32.
        eps: added to the variance, >= 0.
        backend: see :mod:`diffit_kernels.dispatch`.

    Returns:
        ``out`` (B, N, C) in the dtype of ``x``; with ``y``, the pair (new x, ``out``). Statistics
        and sums are in float32 (float64 for float64). Differentiable once in every tensor.

    Raises:
        TypeError, ValueError: an argument breaks one of the rules above; the message has its value.
        NotImplementedError: the requested backend cannot serve the case.
    """
    op = "adaln"
    check_activation(op, "x", x, "B N C")
    batch, tokens, channels = x.shape
    if y is not None:
        check_tensor(op, "y", y, batch, tokens, channels, like=x, narrower=True)
    elif gate is not None:
        raise ValueError(f"{op}: gate scales y, but y is None")
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be >= 0, got {eps}")
    gate, shift, scale = (
        _per_token(op, name, value, x)
        for name, value in (("gate", gate), ("shift", shift), ("scale", scale))
    )
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            check_tensor(op, name, value, channels, like=x)
    args = (x, y, gate, shift, scale, weight, bias, eps)
    out, residual, _, _ = _adaln(x.device, *args, backend=backend)
    return out if y is None else (residual, out)


def _per_token(op: str, name: str, value: Tensor | None, x: Tensor) -> Tensor | None:
    """A modulation as the op takes it: (B, 1, C) per sample or (B, N, C) per token."""
    if value is None:
        return None
    batch, tokens, channels = x.shape
    if isinstance(value, Tensor) and value.dim() == 3:
        check_tensor(op, name, value, batch, tokens, channels, like=x, narrower=True)
        return value
    check_tensor(op, name, value, batch, channels, like=x, narrower=True)
    return value[:, None]


def _fake(x, y, gate, shift, scale, weight, bias, eps):
    residual = x.new_empty(0 if y is None else x.shape)
    return x.new_empty(x.shape), residual, x.new_empty(0), x.new_empty(0)


def _backward_fake(
    grad_out, grad_residual, residual, y, gate, shift, scale, weight, bias, mean, rstd, eps
):
    return tuple(
        residual.new_empty(0) if t is None else t.new_empty(t.shape)
        for t in (residual, y, gate, shift, scale, weight, bias)
    )


def _setup_context(ctx, inputs, output):
    x, y, gate, shift, scale, weight, bias, ctx.eps = inputs
    _, residual, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    residual = x if y is None else residual
    ctx.y_dtype = None if y is None else y.dtype
    y = y if gate is not None else None  # without a gate, y's gradient is x's
    ctx.save_for_backward(residual, y, gate, shift, scale, weight, bias, mean, rstd)


def _backward(op, ctx, grad_out, grad_residual, _mean, _rstd):
    residual, y, gate, shift, scale, weight, bias, mean, rstd = ctx.saved_tensors
    inputs = (y, gate, shift, scale, weight, bias)
    if grad_out is None:
        grad_out = torch.zeros_like(residual)
    if ctx.y_dtype is None:  # then the residual result was empty, and so is its gradient, if any
        grad_residual = None
    dx, *grads = op(grad_out, grad_residual, residual, *inputs, mean, rstd, ctx.eps)
    dy, *others = (None if t is None else grad for t, grad in zip(inputs, grads, strict=True))
    if ctx.y_dtype is not None and dy is None:
        dy = dx.to(ctx.y_dtype)
    return dx, dy, *others, None


_adaln = FusedOp(
    "adaln",
    __name__,
    schema="(Tensor x, Tensor? y, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? weight, "
    "Tensor? bias, float eps) -> (Tensor out, Tensor residual, Tensor mean, Tensor rstd)",
    backward_schema="(Tensor grad_out, Tensor? grad_residual, Tensor residual, Tensor? y, "
    "Tensor? gate, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor rstd, float eps) -> (Tensor dx, Tensor dy, Tensor dgate, Tensor dshift, Tensor dscale, "
    "Tensor dweight, Tensor dbias)",
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
