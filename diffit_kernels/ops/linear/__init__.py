"""The products beside the attention, by the fastest library on the device."""

from torch import Tensor

from diffit_kernels.dispatch import FusedOp
from diffit_kernels.ops.checks import autocast, check_activation, check_tensor


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """x Wᵀ + b, as ``torch.nn.functional.linear`` has it.

    An op of its own because the library behind that function is not always the fastest one at hand
    (see the native backend); on CUDA it is, and the model calls it directly.

    Args:
        x: (B, N, C); float64, float32, bfloat16 or float16.
        weight: (M, C); the dtype of ``x`` or float32.
        bias: (M,) or None; likewise.
        backend: see :mod:`diffit_kernels.dispatch`.

    Returns:
        (B, N, M) in the dtype of ``x``. Differentiable once in every tensor.

    Raises:
        TypeError, ValueError: an argument breaks one of the rules above; the message has its value.
        NotImplementedError: the requested backend cannot serve the case.
    """
    op = "linear"
    x, weight, bias = autocast(x, weight, bias)
    check_activation(op, "x", x, "B N C")
    check_tensor(op, "weight", weight, None, x.shape[-1], like=x)
    if bias is not None:
        check_tensor(op, "bias", bias, weight.shape[0], like=x)
    return _linear(x.device, x, weight, bias, backend=backend)


def _fake(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _backward_fake(grad_out, x, weight, bias):
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, weight, bias))


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward(op, ctx, grad_out):
    inputs = ctx.saved_tensors
    grads = op(grad_out, *inputs)
    return tuple(None if t is None else grad for t, grad in zip(inputs, grads, strict=True))


_linear = FusedOp(
    "linear",
    __name__,
    schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    backward_schema="(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias)",
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
