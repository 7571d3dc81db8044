"""The time token's projections (DiffiT, eqs. 3-5): added to the tokens' own, or for many blocks."""

from collections.abc import Sequence

from torch import Tensor

from diffit_kernels.dispatch import FusedOp
from diffit_kernels.ops.checks import autocast, check_activation, check_tensor


def time_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temb: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """The tokens' projection with the time token's added to every token of its sample.

    ::

        out[b, n] = weight x[b, n] + bias + temb[b]

    Args:
        x: (B, N, K) tokens; float64, float32, bfloat16 or float16.
        weight: (M, K); bias: (M,) or None; the dtype of ``x`` or float32.
        temb: (B, M), the projected time token.
        backend: see :mod:`diffit_kernels.dispatch`.

    Returns:
        (B, N, M) in the dtype of ``x``. Differentiable once in every tensor.

    Raises:
        TypeError, ValueError: an argument breaks one of the rules above; the message has its value.
        NotImplementedError: the requested backend cannot serve the case.
    """
    op = "time_projection"
    x, weight, bias, temb = autocast(x, weight, bias, temb)
    check_activation(op, "x", x, "B N K")
    check_tensor(op, "weight", weight, None, x.shape[-1], like=x)
    if bias is not None:
        check_tensor(op, "bias", bias, weight.shape[0], like=x)
    check_tensor(op, "temb", temb, x.shape[0], weight.shape[0], like=x)
    return _time_projection(x.device, x, weight, bias, temb, backend=backend)


def time_projections(
    temb: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] = (),
    *,
    backend: str | None = None,
) -> Tensor:
    """The q and v parts of the time token's projection, for one or many blocks in one call.

    ::

        out[i, b] = (W_q temb[b] + b_q, W_v temb[b] + b_v)        W_q, W_k, W_v = weights[i]

    The key part is not computed, for attention does not depend on it (derivation 1 in
    reference/README.md): the key thirds of the gradients are exactly zero.

    Args:
        temb: (B, K) time tokens; float64, float32, bfloat16 or float16.
        weights: (3C, K) each, rows ordered (q, k, v); the dtype of ``temb`` or float32.
        biases: (3C,) each, as many as ``weights``; or none.
        backend: see :mod:`diffit_kernels.dispatch`.

    Returns:
        (len(weights), B, 2C) in the dtype of ``temb``: what
        :func:`~diffit_kernels.ops.window_attention.window_attention` takes. Differentiable once.

    Raises:
        TypeError, ValueError: an argument breaks one of the rules above; the message has its value.
        NotImplementedError: the requested backend cannot serve the case.
    """
    op = "time_projections"
    temb, *weights = autocast(temb, *weights)
    biases = list(autocast(temb, *biases)[1:])
    check_activation(op, "temb", temb, "B K")
    if not weights or len(biases) not in (0, len(weights)):
        raise ValueError(
            f"{op}: give one weight per block and as many biases or none, "
            f"got {len(weights)} weights and {len(biases)} biases"
        )
    check_tensor(op, "weights[0]", weights[0], None, temb.shape[-1], like=temb)
    rows = weights[0].shape[0]
    if rows % 3:
        raise ValueError(f"{op}: weights must have 3C rows, got {rows}")
    for index, weight in enumerate(weights):
        check_tensor(op, f"weights[{index}]", weight, rows, temb.shape[-1], like=temb)
    for index, bias in enumerate(biases):
        check_tensor(op, f"biases[{index}]", bias, rows, like=temb)
    return _time_projections(temb.device, temb, weights, biases, backend=backend)


def _fake(x, weight, bias, temb):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _backward_fake(grad_out, x, weight, bias, temb):
    return tuple(
        x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, weight, bias, temb)
    )


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(op, ctx, grad_out):
    inputs = ctx.saved_tensors
    return tuple(
        None if t is None else grad for t, grad in zip(inputs, op(grad_out, *inputs), strict=True)
    )


_time_projection = FusedOp(
    "time_projection",
    __name__,
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor temb) -> Tensor",
    backward_schema="(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, Tensor temb)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dtemb)",
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _many_fake(temb, weights, biases):
    return temb.new_empty(len(weights), temb.shape[0], weights[0].shape[0] // 3 * 2)


def _many_backward_fake(grad_out, temb, weights, biases):
    return (
        temb.new_empty(temb.shape),
        [weight.new_empty(weight.shape) for weight in weights],
        [bias.new_empty(bias.shape) for bias in biases],
    )


def _many_setup_context(ctx, inputs, output):
    temb, weights, biases = inputs
    ctx.blocks = len(weights)
    ctx.save_for_backward(temb, *weights, *biases)


def _many_backward(op, ctx, grad_out):
    temb, *parameters = ctx.saved_tensors
    return op(grad_out, temb, parameters[: ctx.blocks], parameters[ctx.blocks :])


_time_projections = FusedOp(
    "time_projections",
    __name__,
    schema="(Tensor temb, Tensor[] weights, Tensor[] biases) -> Tensor",
    backward_schema="(Tensor grad_out, Tensor temb, Tensor[] weights, Tensor[] biases)"
    " -> (Tensor dtemb, Tensor[] dweights, Tensor[] dbiases)",
    fake=_many_fake,
    backward_fake=_many_backward_fake,
    setup_context=_many_setup_context,
    backward=_many_backward,
    prefix="many_",
)
