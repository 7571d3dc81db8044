"""GroupNorm and SiLU of channels-last feature maps, in one op: an image-space cell's first step."""

from torch import Tensor

from diffit_kernels.dispatch import FusedOp
from diffit_kernels.ops.checks import accumulation_dtype, check_activation, check_tensor


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    num_groups: int,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """SiLU(GroupNorm(x)), in front of the convolution of an image-space cell (DiffiT, eq. 9).

    ::

        z   = (x - mean) / sqrt(var + eps) · weight + bias
        out = z σ(z)

    with mean and variance of each sample's groups, over all pixels and C / num_groups channels.

    Args:
        x: (B, H, W, C), channels last; float64, float32, bfloat16 or float16.
        weight, bias: (C,), or None; dtype of ``x`` or float32.
        num_groups: divides C; a group is C / num_groups channels side by side.
        eps: added to the variance, >= 0.
        backend: see :mod:`diffit_kernels.dispatch`.

    Returns:
        (B, H, W, C) in the dtype of ``x``. Statistics and sums are in float32 (float64 for
        float64), and under autocast x keeps its dtype. Differentiable once in every tensor.

    Raises:
        TypeError, ValueError: an argument breaks one of the rules above; the message has its value.
        NotImplementedError: the requested backend cannot serve the case.
    """
    op = "group_norm_silu"
    check_activation(op, "x", x, "B H W C")
    channels = x.shape[-1]
    if not isinstance(num_groups, int):
        raise TypeError(f"{op}: num_groups must be an int, got {num_groups!r}")
    if num_groups < 1 or channels < 1 or channels % num_groups:
        raise ValueError(
            f"{op}: num_groups must divide the channels, got num_groups={num_groups} "
            f"for {channels} channels"
        )
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            check_tensor(op, name, value, channels, like=x)
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be >= 0, got {eps}")
    return _group_norm_silu(x.device, x, weight, bias, num_groups, eps, backend=backend)[0]


def _fake(x, weight, bias, num_groups, eps):
    dtype = accumulation_dtype(x.dtype)
    mean, rstd = (x.new_empty((x.shape[0], num_groups), dtype=dtype) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


def _backward_fake(grad_out, x, weight, bias, mean, rstd, num_groups):
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, weight, bias))


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.num_groups, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _backward(op, ctx, grad_out, _mean, _rstd):
    *inputs, mean, rstd = ctx.saved_tensors
    grads = op(grad_out, *inputs, mean, rstd, ctx.num_groups)
    return *(None if t is None else g for t, g in zip(inputs, grads, strict=True)), None, None


_group_norm_silu = FusedOp(
    "group_norm_silu",
    __name__,
    schema="(Tensor x, Tensor? weight, Tensor? bias, int num_groups, float eps) -> "
    "(Tensor out, Tensor mean, Tensor rstd)",
    backward_schema="(Tensor grad_out, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor rstd, int num_groups) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    fake=_fake,
    backward_fake=_backward_fake,
    setup_context=_setup_context,
    backward=_backward,
)
