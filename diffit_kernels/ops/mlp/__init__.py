"""The block's MLP: two products with GELU between, of which at most the pre-activation is kept."""

import torch
from torch import Tensor

from diffit_kernels.dispatch import FusedOp
from diffit_kernels.ops.checks import autocast, check_activation, check_tensor


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    approximate: str = "tanh",
    backend: str | None = None,
) -> Tensor:
    """MLP(x) = W2 GELU(W1 x + b1) + b2, DiffiT's with the tanh form of GELU (eq. 8).

    The backward recomputes GELU from the pre-activation, so one (B, N, 4C) tensor is kept, not two;
    and none where no gradient is asked for.

    Args:
        x: (B, N, C); float64, float32, bfloat16 or float16.
        fc1_weight: (M, C); fc1_bias: (M,) or None; the dtype of ``x`` or float32.
        fc2_weight: (D, M); fc2_bias: (D,) or None; likewise.
        approximate: "tanh", or "none" for the exact GELU.
        backend: see :mod:`diffit_kernels.dispatch`.

    Returns:
        (B, N, D) in the dtype of ``x``. Differentiable once in every tensor.

    Raises:
        TypeError, ValueError: an argument breaks one of the rules above; the message has its value.
        NotImplementedError: the requested backend cannot serve the case.
    """
    op = "mlp"
    x, fc1_weight, fc1_bias, fc2_weight, fc2_bias = autocast(
        x, fc1_weight, fc1_bias, fc2_weight, fc2_bias
    )
    check_activation(op, "x", x, "B N C")
    check_tensor(op, "fc1_weight", fc1_weight, None, x.shape[-1], like=x)
    hidden = fc1_weight.shape[0]
    check_tensor(op, "fc2_weight", fc2_weight, None, hidden, like=x)
    for name, bias, size in (
        ("fc1_bias", fc1_bias, hidden),
        ("fc2_bias", fc2_bias, fc2_weight.shape[0]),
    ):
        if bias is not None:
            check_tensor(op, name, bias, size, like=x)
    if approximate not in ("tanh", "none"):
        raise ValueError(f"{op}: approximate must be 'tanh' or 'none', got {approximate!r}")
    tensors = (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    keep_hidden = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in tensors
    )
    return _mlp(x.device, *tensors, approximate, keep_hidden, backend=backend)[0]


def _fake(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, approximate, keep_hidden):
    rows = x.shape[:-1]
    hidden = (*rows, fc1_weight.shape[0]) if keep_hidden else (0,)
    return x.new_empty(*rows, fc2_weight.shape[0]), x.new_empty(hidden)


def _backward_fake(grad_out, x, hidden, fc1_weight, fc1_bias, fc2_weight, fc2_bias, approximate):
    return tuple(
        x.new_empty(0) if t is None else t.new_empty(t.shape)
        for t in (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.approximate, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _backward(op, ctx, grad_out, _):
    *inputs, hidden = ctx.saved_tensors
    x, *parameters = inputs
    grads = op(grad_out, x, hidden, *parameters, ctx.approximate)
    return *(None if t is None else g for t, g in zip(inputs, grads, strict=True)), None, None


_mlp = FusedOp(
    "mlp",
    __name__,
    schema="(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, "
    "str approximate, bool keep_hidden) -> (Tensor out, Tensor hidden)",
    backward_schema="(Tensor grad_out, Tensor x, Tensor hidden, Tensor fc1_weight, "
    "Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, str approximate) -> "
    "(Tensor dx, Tensor dfc1_weight, Tensor dfc1_bias, Tensor dfc2_weight, Tensor dfc2_bias)",
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
